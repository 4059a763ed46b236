"""What a section is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device was seen to do at best; 0: not measured."""

    bytes_per_second: float = 0.0
    """Read and written by a copy, added up."""
    flops: float = 0.0
    """A second, of products in the models' number format; a multiplication and an addition are two."""

    @property
    def known(self) -> bool:
        return self.bytes_per_second > 0 and self.flops > 0


@dataclass(frozen=True, slots=True)
class Setting:
    """One section's run."""

    device_type: str
    """cuda or cpu."""
    tiny: bool = False
    """Shrunken models and few rounds: shows that the benchmark runs, and nothing about any device."""
    model: str = ""
    limits: Limits = Limits()

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The models'."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    @property
    def backend(self) -> str:
        """Attention, as it is served; on a CPU, torch's."""
        return "triton" if self.is_cuda else "sdpa"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        content = json.loads(text)
        return cls(**{**content, "limits": Limits(**content["limits"])})
