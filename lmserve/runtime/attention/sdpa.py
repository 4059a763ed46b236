"""Attention through torch's ``scaled_dot_product_attention``, on any device.

Decoding sequences whose contexts fall into the same bucket of lengths are gathered from the cache and attended to in
one call, the query heads of a key-value head folded into rows (so that its keys are read once). The padded length is a
function of the sequence's own context alone, never of its neighbours': a row's arithmetic is then the same whoever
else is in the step. Prompt chunks are attended to one sequence at a time. Layers with a softcap or sinks, which the
fused kernels lack, take the dense way over the same gathered keys.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lmserve.runtime.attention.base import (
    AttentionBackend,
    LayerCache,
    LayerOptions,
    Span,
    dense_attention,
    visible,
)

NO_WINDOW = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that share one call: B of them, with L keys each (padding included) and q_len queries each."""

    rows: Tensor
    """(B * q_len,) rows of the packed step."""
    q_len: int
    table: Tensor
    """(B * L / block_size,) blocks to read, in order."""
    first_slot: int | None
    """Where the L cache rows begin if B is 1 and the blocks are adjacent, else None."""
    num_keys: int
    keep: Tensor
    """(B, 1, q_len, L) bool: which keys each query sees."""
    bias: Tensor
    """The same as an additive mask in the model's dtype."""


@dataclass(slots=True)
class SdpaPlan:
    """The spans of a step, grouped anew for each window that a layer asks for (most models have one or two)."""

    spans: list[Span]
    groups: dict[int, list[Group]] = field(default_factory=dict)


def bucket_length(num_keys: int) -> int:
    """The padded length for a context: steps of 64 up to 512, then an eighth of the power of two above it."""
    step = max(64, 1 << max(0, (num_keys - 1).bit_length() - 3))
    return -(-num_keys // step) * step


class SdpaBackend(AttentionBackend):
    """The portable backend."""

    name: ClassVar[str] = "sdpa"

    def plan(self, spans: list[Span]) -> SdpaPlan:
        return SdpaPlan(spans)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, plan: SdpaPlan, options: LayerOptions
    ) -> Tensor:
        window = options.window or NO_WINDOW
        groups = plan.groups.get(window)
        if groups is None:
            groups = plan.groups[window] = self._group(plan.spans, options.window)
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        for group in groups:
            out.index_copy_(0, group.rows, self._attend_group(q.index_select(0, group.rows), cache, group, options))
        return out

    def _attend_group(self, q: Tensor, cache: LayerCache, group: Group, options: LayerOptions) -> Tensor:
        """(B * q_len, heads, Dk) -> (B * q_len, heads, Dv)."""
        size = group.keep.shape[0]
        keys, values = (self._read(pool, group).transpose(1, 2) for pool in (cache.k, cache.v))
        queries = q.view(size, group.q_len, *q.shape[1:]).transpose(1, 2)
        if options.needs_dense:
            result = dense_attention(queries, keys, values, group.keep, options)
        elif group.q_len == 1:
            result = self._fused_decode(queries, keys, values, group.bias, options.scaling)
        else:
            result = self._fused_grouped(queries, keys, values, group.bias, options.scaling)
        return result.transpose(1, 2).reshape(q.shape[0], q.shape[1], values.shape[-1])

    def _read(self, pool: Tensor, group: Group) -> Tensor:
        """The group's cache rows, (B, L, kv heads, D)."""
        blocks = pool.view(-1, self.layout.block_size * pool.shape[1] * pool.shape[2])
        return blocks.index_select(0, group.table).view(-1, group.num_keys, *pool.shape[1:])

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        size = v.shape[-1]
        if size < k.shape[-1]:  # the fused kernels want equal sizes (MLA has smaller values)
            v = pad(v, (0, k.shape[-1] - size))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)[..., :size]

    def _fused_decode(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """q (B, heads, 1, Dk) -> (B, heads, 1, Dv)."""
        folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        return self._fused(folded, k, v, bias, scaling).reshape(*q.shape[:3], v.shape[-1])

    def _fused_grouped(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:  # grouped heads are not native to every device's masked kernel
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        return self._fused(q, k, v, bias, scaling)

    def _group(self, spans: list[Span], window: int | None) -> list[Group]:
        decodes: defaultdict[int, list[Span]] = defaultdict(list)
        groups = []
        for span in spans:
            if span.q_len == 1 and not span.has_image_rows:
                decodes[self._padded_length(span, window)].append(span)
            else:
                groups.append(self._make_group([span], self._padded_length(span, window), window))
        groups.extend(self._make_group(same, num_keys, window) for num_keys, same in decodes.items())
        return groups

    def _first_block(self, span: Span, window: int | None) -> int:
        """The first block that any query of the span sees."""
        if window is None:
            return 0
        row = span.kv_len - span.q_len
        images = () if span.only_in_windows else span.images
        first = min([row + 1 - window, *(start for start, end in images if end > row)])
        return max(0, first) // self.layout.block_size

    def _padded_length(self, span: Span, window: int | None) -> int:
        needed = span.kv_len - self._first_block(span, window) * self.layout.block_size
        return -(-bucket_length(needed) // self.layout.block_size) * self.layout.block_size

    def _make_group(self, spans: list[Span], num_keys: int, window: int | None) -> Group:
        width = num_keys // self.layout.block_size
        tables = np.full((len(spans), width), self.layout.scratch_block, dtype=np.int64)
        firsts = [self._first_block(span, window) for span in spans]
        for i, (span, first) in enumerate(zip(spans, firsts, strict=True)):
            used = -(-span.kv_len // self.layout.block_size)
            tables[i, : used - first] = span.block_table[first:used]
        q_len = spans[0].q_len
        ends = torch.tensor([span.kv_len for span in spans], device=self.layout.device)
        starts = torch.tensor(firsts, device=self.layout.device) * self.layout.block_size
        q_positions = (ends[:, None] - q_len + torch.arange(q_len, device=self.layout.device)).flatten()
        k_positions = starts[:, None] + torch.arange(num_keys, device=self.layout.device)
        k_positions = k_positions.repeat_interleave(q_len, dim=0)
        seer = spans[0] if spans[0].has_image_rows else None
        keep = visible(q_positions, k_positions, window, seer).view(len(spans), 1, q_len, num_keys)
        bias = torch.zeros(keep.shape, dtype=self.layout.dtype, device=self.layout.device).masked_fill_(
            ~keep, float("-inf")
        )
        rows = np.concatenate([np.arange(span.row, span.row + q_len) for span in spans])
        return Group(
            rows=torch.from_numpy(rows).to(self.layout.device),
            q_len=q_len,
            table=torch.from_numpy(tables.ravel()).to(self.layout.device),
            first_slot=self._adjacent(tables[0], num_keys) if len(spans) == 1 else None,
            num_keys=num_keys,
            keep=keep,
            bias=bias,
        )

    def _adjacent(self, table: np.ndarray[tuple[int], np.dtype[np.int64]], num_keys: int) -> int | None:
        """The first cache row, if the blocks that hold keys lie side by side and the padding stays inside the cache."""
        blocks = table[table != self.layout.scratch_block]
        first = int(blocks[0]) * self.layout.block_size
        inside = first + num_keys <= self.layout.num_slots
        return first if inside and bool((np.diff(blocks) == 1).all()) else None
