"""The backend that is obviously right: one sequence at a time, in float32, from the cache alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lmserve.runtime.attention.base import (
    AttentionBackend,
    LayerCache,
    LayerOptions,
    Span,
    dense_attention,
    visible,
)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """See ``AttentionBackend.plan_decode``."""

    tables: Tensor
    table_rows: Tensor
    kv_lens: Tensor


class ReferenceBackend(AttentionBackend):
    """Every other backend is held to this one."""

    name: ClassVar[str] = "reference"
    keeps_fp8: ClassVar[bool] = True
    reads_device_lengths: ClassVar[bool] = True

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        for pool, new, scale in ((cache.k, k, cache.k_scale), (cache.v, v, cache.v_scale)):
            if pool.dtype == new.dtype:
                pool.index_copy_(0, slot_mapping, new)
            else:  # torch copies no rows of 8-bit floats, but of bytes
                largest = torch.finfo(pool.dtype).max  # beyond it not every version of torch makes a number
                stored = (new.float() / scale).clamp(-largest, largest).to(pool.dtype)
                pool.view(torch.uint8).index_copy_(0, slot_mapping, stored.view(torch.uint8))

    def plan_decode(self, tables: Tensor, table_rows: Tensor, kv_lens: Tensor) -> DecodePlan:
        return DecodePlan(tables, table_rows, kv_lens)

    def plan(self, spans: list[Span]) -> list[tuple[Span, Tensor]]:
        """Each span with the cache rows of its tokens."""
        return [(span, self._cache_rows(span)) for span in spans]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: list[tuple[Span, Tensor]] | DecodePlan,
        options: LayerOptions,
    ) -> Tensor:
        if isinstance(plan, DecodePlan):
            return self._attend_decode(q, cache, plan, options)
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        for span, cache_rows in plan:
            rows = slice(span.row, span.row + span.q_len)
            k_positions = torch.arange(span.kv_len, device=self.layout.device)
            q_positions = k_positions[span.kv_len - span.q_len :]
            out[rows] = dense_attention(
                q[rows].transpose(0, 1)[None],
                _read(cache.k, cache.k_scale, cache_rows).transpose(0, 1)[None],
                _read(cache.v, cache.v_scale, cache_rows).transpose(0, 1)[None],
                visible(q_positions, k_positions, options.window, span),
                options,
            )[0].transpose(0, 1)
        return out

    def _attend_decode(self, q: Tensor, cache: LayerCache, plan: DecodePlan, options: LayerOptions) -> Tensor:
        """All rows at once, over as many keys as a table has: padding keys are hidden, and so are other windows'."""
        block_size = self.layout.block_size
        slots = plan.tables.index_select(0, plan.table_rows)[:, :, None].long() * block_size
        slots = (slots + torch.arange(block_size, device=q.device)).flatten(1)
        positions = torch.arange(slots.shape[1], device=q.device)
        ends = plan.kv_lens[:, None]
        keep = positions < ends.clamp_min(1)  # padding sees something, for a softmax of nothing is no number
        if options.window is not None:
            keep &= positions >= ends - options.window
        scaled = ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        keys, values = (_read(pool, scale, slots).transpose(1, 2) for pool, scale in scaled)
        return dense_attention(q[:, :, None], keys, values, keep[:, None, None], options)[:, :, 0]

    def _cache_rows(self, span: Span) -> Tensor:
        block_size, device = self.layout.block_size, self.layout.device
        slots = torch.tensor(span.block_table, device=device)[:, None] * block_size
        slots = slots + torch.arange(block_size, device=device)
        return slots.flatten()[: span.kv_len]


def _read(pool: Tensor, scale: float, rows: Tensor) -> Tensor:
    """Rows of a pool, in float32 if they are kept in less than the model's format."""
    if pool.dtype.itemsize > 1:
        return pool[rows]
    return pool.view(torch.uint8)[rows].view(pool.dtype).float() * scale
