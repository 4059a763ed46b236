"""The backend that is obviously right: one sequence at a time, in float32, from the cache alone."""

from __future__ import annotations

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


class ReferenceBackend(AttentionBackend):
    """Every other backend is held to this one."""

    name: ClassVar[str] = "reference"

    def plan(self, spans: list[Span]) -> list[tuple[Span, Tensor]]:
        """Each span with the cache rows of its tokens."""
        return [(span, self._cache_rows(span)) for span in spans]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, plan: list[tuple[Span, Tensor]], options: LayerOptions
    ) -> Tensor:
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        for span, cache_rows in plan:
            rows = slice(span.row, span.row + span.q_len)
            k_positions = torch.arange(span.kv_len, device=self.layout.device)
            q_positions = k_positions[span.kv_len - span.q_len :]
            out[rows] = dense_attention(
                q[rows].transpose(0, 1)[None],
                cache.k[cache_rows].transpose(0, 1)[None],
                cache.v[cache_rows].transpose(0, 1)[None],
                visible(q_positions, k_positions, options.window, span.images),
                options,
            )[0].transpose(0, 1)
        return out

    def _cache_rows(self, span: Span) -> Tensor:
        block_size, device = self.layout.block_size, self.layout.device
        slots = torch.tensor(span.block_table, device=device)[:, None] * block_size
        slots = slots + torch.arange(block_size, device=device)
        return slots.flatten()[: span.kv_len]
