"""The figures under /api/v0, from what the service measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmserve import __version__
from lmserve.api.schema.stats import ModelInfo, Runtime, Stats
from lmserve.service.deltas import Finished, Usage
from lmserve.service.protocols import ModelEntry
from lmserve.service.request import GenerationRequest

_QUANT = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
RUNTIME = Runtime("lmserve", __version__, ["safetensors", "gguf"])


@dataclass(frozen=True, slots=True)
class StatsReporter:
    """What an answer of one model ends with; ``of`` makes the three fields."""

    model_info: ModelInfo

    @classmethod
    def for_request(cls, generation: GenerationRequest) -> StatsReporter:
        info, entry = generation.model.engine.info, generation.model.entry
        return cls(
            ModelInfo(
                info.model_type or info.architecture,
                quantization(info.dtype),
                file_format(entry),
                generation.context_length,
            )
        )

    def of(self, usage: Usage, finished: Finished) -> dict[str, Stats | ModelInfo | Runtime]:
        seconds = usage.generation_time
        stats = Stats(
            tokens_per_second=usage.num_completion_tokens / seconds if seconds > 0 else 0.0,
            time_to_first_token=usage.time_to_first_token if usage.num_completion_tokens else 0.0,
            generation_time=seconds,
            stop_reason=finished.stop_reason.value,
        )
        return {"stats": stats, "model_info": self.model_info, "runtime": RUNTIME}


def quantization(dtype: str) -> str:
    """The number format of the weights, in LM Studio's short names; of a model quantized at its load INT8 or INT4."""
    return _QUANT.get(dtype, dtype.partition(" ")[0].upper())


def file_format(entry: ModelEntry) -> Literal["safetensors", "gguf"]:
    return "gguf" if entry.path.endswith(".gguf") else "safetensors"
