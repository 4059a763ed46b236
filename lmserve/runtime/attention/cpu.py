"""The CPU backend: the portable one, tuned by measurement (``benchmarks/attention.py``).

For many short contexts one gather and one call are faster than a call a sequence, the gather itself being a tenth to a
quarter of the time. One sequence alone is read in place, which is why the scheduler prefers adjacent blocks and takes a
prompt's blocks in one allocation. torch's CPU kernel takes grouped heads as they are; folding them into rows is several
times faster in bfloat16 and slower in float32.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmserve.runtime.attention.sdpa import Group, SdpaBackend


class CpuBackend(SdpaBackend):
    """Reads in place what lies side by side, and picks the faster shape of a call by number format."""

    name: ClassVar[str] = "cpu"

    def _read(self, pool: Tensor, group: Group) -> Tensor:
        if group.first_slot is not None:
            return pool[group.first_slot : group.first_slot + group.num_keys][None]
        return super()._read(pool, group)

    def _fused_decode(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        if q.dtype == torch.float32:
            return self._fused_grouped(q, k, v, bias, scaling)
        return super()._fused_decode(q, k, v, bias, scaling)

    def _fused_grouped(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        if k.shape[-1] != v.shape[-1]:
            return super()._fused_grouped(q, k, v, bias, scaling)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling, enable_gqa=True)
