"""What an attention backend is, and the dense arithmetic that every backend may fall back on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """The rows ``[row, row + q_len)`` of a packed step: the newest ``q_len`` of a sequence's ``kv_len`` tokens."""

    row: int
    q_len: int
    kv_len: int
    block_table: list[int]
    images: tuple[tuple[int, int], ...] = ()
    """Positions [start, end) of images whose tokens all see each other. A step never ends inside one."""
    only_in_windows: bool = False
    """Whether they do so only in layers with a sliding window, and only within that (Gemma 4); else in all layers, and
    whatever the window (Gemma 3)."""

    @property
    def has_image_rows(self) -> bool:
        """Whether any of the rows is of such an image."""
        return any(start < self.kv_len and end > self.kv_len - self.q_len for start, end in self.images)

    def images_in(self, window: int | None) -> tuple[tuple[int, int], ...]:
        """Those whose tokens see each other in a layer with this window."""
        return () if self.only_in_windows and window is None else self.images


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How the paged cache is cut, and where it lies. A scratch block follows the ``num_blocks`` that are handed out."""

    block_size: int
    num_blocks: int
    device: torch.device
    dtype: torch.dtype
    """The model's."""
    cache_dtype: torch.dtype | None = None
    """In which keys and values are kept; None: the model's."""

    @property
    def pool_dtype(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    @property
    def scratch_block(self) -> int:
        """Padding rows write here and padded block tables point here."""
        return self.num_blocks

    @property
    def num_slots(self) -> int:
        """Tokens that a layer's pool has room for, the scratch block included."""
        return (self.num_blocks + 1) * self.block_size


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The paged K and V of one attention layer, one row a token: (num_slots, kv heads, head size).

    Pools of 8 bits hold keys and values divided by the scales, and at most the largest number of their format; pools in
    the model's own format have no use for scales.
    """

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """What a model's attention layer asks for, besides queries, keys and values."""

    scaling: float
    window: int | None = None
    """Sliding window: a query at position p sees the keys at positions > p - window."""
    softcap: float | None = None
    sinks: Tensor | None = None
    """(heads,): one more logit for each head, whose probability goes nowhere (gpt-oss)."""

    @property
    def needs_dense(self) -> bool:
        """Whether torch's fused kernels cannot do it."""
        return self.softcap is not None or self.sinks is not None


class AttentionBackend(ABC):
    """One way of attending over the paged cache.

    ``plan`` runs once a step, on the host; ``write`` and then ``attend`` once a layer: the keys and values of the
    step's tokens are in the cache before they are attended to. Rows beyond the spans (padding) may come out as
    anything finite.
    """

    name: ClassVar[str]
    keeps_fp8: ClassVar[bool] = False
    """Whether keys and values may lie in the cache as float8_e4m3fn, with scales."""
    runs_on_cpu: ClassVar[bool] = True
    """So that the tests can hold it to the reference where there is no GPU."""
    reads_device_lengths: ClassVar[bool] = False
    """Whether it has ``plan_decode``, so that a step can be captured once and run again with other lengths."""

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout

    @abstractmethod
    def plan(self, spans: list[Span]) -> Any:
        """Everything about the step that does not depend on the layer."""

    def plan_decode(self, tables: Tensor, table_rows: Tensor, kv_lens: Tensor) -> Any:
        """A plan for all steps of B rows in which each row is the newest token of another sequence.

        What the tensors hold is read on the device whenever ``attend`` runs, and nothing of it on the host.

        Args:
            tables: (any, width) int32, the blocks of a sequence in order, then the scratch block.
            table_rows: (B,) int64, which of the tables is a row's.
            kv_lens: (B,) int32, tokens that a row sees; 0 for padding, whose result may be anything finite.
        """
        raise NotImplementedError

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Puts k, v (T, kv heads, Dk | Dv) into the cache rows (T,) int64; padding's row is in the scratch block."""
        cache.k.index_copy_(0, slot_mapping, k)
        cache.v.index_copy_(0, slot_mapping, v)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, plan: Any, options: LayerOptions) -> Tensor:
        """q (T, heads, Dk) and the same tokens' k, v (T, kv heads, Dk | Dv) -> (T, heads, Dv)."""


def visible(q_positions: Tensor, k_positions: Tensor, window: int | None, span: Span | None = None) -> Tensor:
    """(len(q_positions), len(k_positions)) bool: which keys a query sees: those before it, as far as the window goes
    back, and its own image's. ``span``: the queries', which knows of images."""
    keep = k_positions <= q_positions[:, None]
    near = None if window is None else k_positions > q_positions[:, None] - window
    if near is not None:
        keep &= near
    if span is None:
        return keep
    for start, end in span.images_in(window):
        together = (
            ((q_positions >= start) & (q_positions < end))[:, None] & (k_positions >= start) & (k_positions < end)
        )
        keep |= together & near if near is not None and span.only_in_windows else together
    return keep


def dense_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, options: LayerOptions) -> Tensor:
    """Attention written out, in float32: q (B, heads, Lq, Dk), k, v (B, kv heads, Lk, D), keep (B|1, 1, Lq, Lk) bool.

    One key-value head at a time, so that only its group's scores are in memory.
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    group = num_heads // num_kv_heads
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for h in range(num_kv_heads):
        heads = slice(h * group, (h + 1) * group)
        scores = torch.matmul(q[:, heads].float(), k[:, h, None].float().transpose(-1, -2)) * options.scaling
        if options.softcap is not None:
            scores = torch.tanh(scores / options.softcap) * options.softcap
        scores = scores.masked_fill(~keep, float("-inf"))
        if options.sinks is not None:
            sink = options.sinks[heads].float().view(1, group, 1, 1).expand(*scores.shape[:3], 1)
            probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            probabilities = scores.softmax(dim=-1)
        out[:, heads] = torch.matmul(probabilities, v[:, h, None].float()).to(out.dtype)
    return out
