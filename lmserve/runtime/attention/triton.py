"""The backend for NVIDIA GPUs: Triton kernels that read the paged cache in place (``triton_kernels.py``).

The decodes of a step are one launch, split over their contexts, and a second one that puts the parts together; its
prompt chunks are another, not split, in tiles of many rows. All lengths and tables of a step cross to the device in one
copy, and nothing comes back.

A decode is computed in the same way in a step of any kind and in a captured one, so it has the same bits there. The
price: a context is cut by its own length alone, so that where many sequences fill the GPU without that, contexts are
cut all the same. A part costs some hundredths of what reading its keys costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.attention.base import AttentionBackend, CacheLayout, LayerCache, LayerOptions, Span
from lmserve.runtime.attention.triton_kernels import (
    LOG2_E,
    NOWHERE,
    combine_kernel,
    decode_kernel,
    prompt_kernel,
    write_kernel,
)
from lmserve.runtime.transfer import send

SEGMENTS = 16
"""Into which a context is cut at most: one sequence alone then keeps SEGMENTS x kv heads processors busy."""
LEAST_SEGMENT = 256
"""Keys: a shorter segment costs more to put together than it gains."""
DECODE_ROWS = 16
"""Of a tile, the least that tensor cores take; as many as there are heads for a key-value head, if those are more."""
PROMPT_ROWS = 128
"""Of a tile, at most: two warp groups with products of 64 rows each. Where heads are larger than 128 the sums of a
tile's values would not fit into a program's registers: then it has half as many, or a quarter."""
PROMPT_ROWS_OF_32_BITS = 32
"""The same: a product of such numbers on tensor cores is three, of operands in two parts each."""
MOST_NUMBERS = 256
"""Of a key and its value, that such tiles are for."""
DECODE_TILE_BYTES = 64 * 1024
"""Of keys and values that are looked at together, at most, in three stages: one is the look into the table, so one tile
is on its way while another is looked at. Four programs on a processor have enough on their way to keep memory busy.
Half of it for numbers of 32 bits, whose operands in parts fill the registers."""
PROMPT_TILE_BYTES = 32 * 1024
"""The same, two stages; half of it before Hopper, whose products take their operands from registers."""
MOST_KEYS, LEAST_KEYS = 64, 16
"""Of a tile. The least is what a product takes."""
ADA, HOPPER = 89, 90
"""Capabilities. Ada is the first to convert from and to 8 bits."""
OF_BITS = 256.0
"""What bits are multiplied with to be the numbers that they stand for, see ``triton_kernels``."""
ALIGNMENT = 4
"""Numbers of 4 bytes: the parts of the one copy begin at multiples of 16 bytes, as loads of that size need."""


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows of which each is a sequence's newest token. All (B,), on the device; the grid depends on B alone."""

    tables: Tensor
    """(any, width) int32."""
    table_rows: Tensor
    kv_lens: Tensor
    rows: Tensor
    """Of the packed step."""
    num_segments: int
    """That are launched: as many as the longest context can need. How a context is cut does not depend on it."""


@dataclass(slots=True)
class Prompts:
    """Chunks of several tokens."""

    spans: list[Span]
    tables: Tensor
    table_rows: Tensor
    kv_lens: Tensor
    rows: Tensor
    """Each one's first in the packed step."""
    q_lens: Tensor
    row_bounds: Tensor | None
    """(T x 2) int32: where what a row sees ends, and where what it sees whatever the window begins; None if the one is
    behind itself and the other nowhere (no images)."""
    tiles: dict[int, list[Tensor]] = field(default_factory=dict)
    """By the tokens that a tile takes: each tile's span, and its first token in it."""


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """One step, as the kernels read it."""

    decodes: Decodes | None
    prompts: Prompts | None
    num_rows: int
    """Of the packed step, that are attended to."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is compiled for."""

    group: int
    num_kv_heads: int
    key_size: int
    value_size: int
    rows: int
    """Of a tile."""
    keys: int
    """That are looked at together."""

    @classmethod
    def of(cls, q: Tensor, cache: LayerCache, capability: int, *, is_decode: bool) -> Shape:
        """``capability``: the device's, as 10 x major + minor; 0 in the interpreter."""
        num_kv_heads, key_size = cache.k.shape[1:]
        value_size = cache.v.shape[2]
        group = q.shape[1] // num_kv_heads
        numbers = triton.next_power_of_2(key_size) + triton.next_power_of_2(value_size)
        in_32_bits = q.element_size() == 4
        if is_decode:
            least, num_bytes = DECODE_ROWS, DECODE_TILE_BYTES // (2 if in_32_bits else 1)
        else:
            least = PROMPT_ROWS_OF_32_BITS if in_32_bits else PROMPT_ROWS
            least = max(DECODE_ROWS, least // max(1, triton.next_power_of_2(numbers) // MOST_NUMBERS))
            num_bytes = PROMPT_TILE_BYTES if capability >= HOPPER else PROMPT_TILE_BYTES // 2
        rows = max(least, triton.next_power_of_2(group))
        keys = num_bytes // (numbers * q.element_size())
        keys = min(MOST_KEYS, max(LEAST_KEYS, 1 << (keys.bit_length() - 1)))
        return cls(group, num_kv_heads, key_size, value_size, rows, keys)

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.rows // self.group

    @property
    def value_width(self) -> int:
        """Of a value in the kernels."""
        return max(16, int(triton.next_power_of_2(self.value_size)))

    @property
    def constants(self) -> dict[str, Any]:
        first = 1 << (self.key_size.bit_length() - 1)
        rest = self.key_size - first
        if first < 16 or self.key_size < 64:  # too small to be cut
            first, rest = max(16, triton.next_power_of_2(self.key_size)), 0
        return {
            "G": self.group,
            "HK": self.num_kv_heads,
            "DK": self.key_size,
            "D1": first,
            "D2": max(16, triton.next_power_of_2(rest)) if rest else 0,
            "DV": self.value_size,
            "DVP": self.value_width,
            "BM": self.rows,
            "BN": self.keys,
        }


class TritonBackend(AttentionBackend):
    """Also runs in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``), slowly: that is how it is tested."""

    name: ClassVar[str] = "triton"
    keeps_fp8: ClassVar[bool] = True
    reads_device_lengths: ClassVar[bool] = True
    least_segment: ClassVar[int] = LEAST_SEGMENT

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__(layout)
        self.capability = 0
        """The device's, as 10 x major + minor; 0 in the interpreter."""
        if layout.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(layout.device)
            self.capability = 10 * major + minor

    def plan(self, spans: list[Span]) -> TritonPlan:
        decodes = [span for span in spans if span.q_len == 1 and not span.has_image_rows]
        prompts = [span for span in spans if span.q_len > 1 or span.has_image_rows]
        width = max((-(-span.kv_len // self.layout.block_size) for span in spans), default=1)
        width = -(-width // ALIGNMENT) * ALIGNMENT
        parts: list[NDArray[np.int32]] = []
        for group in (decodes, prompts):
            parts += [
                self._tables(group, width),
                np.arange(len(group), dtype=np.int32),
                *_numbers([(span.kv_len, span.row, span.q_len) for span in group]),
            ]
        bounds = _row_bounds(prompts)
        parts.append(np.empty(0, np.int32) if bounds is None else bounds.ravel())
        sent = self._send(parts)
        for_decodes = for_prompts = None
        if decodes:
            num_segments = self._num_segments(max(span.kv_len for span in decodes))
            for_decodes = Decodes(sent[0].view(-1, width), sent[1], sent[2], sent[3], num_segments)
        if prompts:
            tables, table_rows, kv_lens, rows, q_lens, row_bounds = sent[5:]
            bounds_if_any = None if bounds is None else row_bounds
            for_prompts = Prompts(prompts, tables.view(-1, width), table_rows, kv_lens, rows, q_lens, bounds_if_any)
        return TritonPlan(for_decodes, for_prompts, sum(span.q_len for span in spans))

    def plan_decode(self, tables: Tensor, table_rows: Tensor, kv_lens: Tensor) -> TritonPlan:
        rows = torch.arange(len(kv_lens), dtype=torch.int32, device=kv_lens.device)
        num_segments = self._num_segments(tables.shape[1] * self.layout.block_size)
        return TritonPlan(Decodes(tables, table_rows, kv_lens, rows, num_segments), None, len(rows))

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        num_kv_heads, key_size, value_size = *cache.k.shape[1:], cache.v.shape[2]
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        as_bits = self.as_bits(cache)
        if as_bits:
            cache = _bits(cache)
        write_kernel[(len(slot_mapping),)](
            *(k, v, cache.k, cache.v, slot_mapping),
            *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.k_scale, cache.v_scale),
            HK=num_kv_heads,
            HP=triton.next_power_of_2(num_kv_heads),
            DK=key_size,
            DKP=triton.next_power_of_2(key_size),
            DV=value_size,
            DVP=triton.next_power_of_2(value_size),
            AS_BITS=as_bits,
        )

    def as_bits(self, cache: LayerCache) -> bool:
        """Whether the kernels have to convert the pools' numbers themselves."""
        return cache.k.dtype == torch.float8_e4m3fn and self.capability < ADA

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, plan: TritonPlan, options: LayerOptions
    ) -> Tensor:
        size = (q.shape[0], q.shape[1], cache.v.shape[2])
        # Rows of no span are left out by the kernels; what they hold has to be finite all the same.
        out = q.new_empty(size) if plan.num_rows == q.shape[0] else q.new_zeros(size)
        q = q if q.stride(2) == 1 else q.contiguous()
        if self.as_bits(cache):
            cache = _bits(cache, OF_BITS)
        if plan.decodes is not None:
            self._attend_decodes(q, out, cache, plan.decodes, options)
        if plan.prompts is not None:
            self._attend_prompts(q, out, cache, plan.prompts, options)
        return out

    def _attend_decodes(
        self, q: Tensor, out: Tensor, cache: LayerCache, decodes: Decodes, options: LayerOptions
    ) -> None:
        shape = Shape.of(q, cache, self.capability, is_decode=True)
        num_rows, num_heads = len(decodes.rows), q.shape[1]
        parts = [out, out, out]
        if decodes.num_segments > 1:
            sizes = (num_rows, num_heads, SEGMENTS)
            parts = [q.new_empty(size, dtype=torch.float32) for size in ((*sizes, shape.value_width), sizes, sizes)]
        sinks = q if options.sinks is None else options.sinks
        decode_kernel[(num_rows, shape.num_kv_heads, decodes.num_segments)](
            *(q, cache.k, cache.v, out, *parts),
            *(decodes.tables, decodes.table_rows, decodes.kv_lens, decodes.rows, sinks),
            *_arguments(q, out, decodes.tables, cache, options),
            **self.constants(shape, cache, options, is_decode=True),
        )
        if decodes.num_segments > 1:
            combine_kernel[(num_rows, num_heads)](
                *(*parts, out, decodes.kv_lens, decodes.rows, sinks),
                *(out.stride(0), out.stride(1), cache.v_scale, options.window or 0),
                HEADS=num_heads,
                DV=shape.value_size,
                DVP=shape.value_width,
                BN=shape.keys,
                SEGMENTS=SEGMENTS,
                LEAST_SEGMENT=self.least_segment,
                HAS_WINDOW=options.window is not None,
                HAS_SINKS=options.sinks is not None,
            )

    def _attend_prompts(
        self, q: Tensor, out: Tensor, cache: LayerCache, prompts: Prompts, options: LayerOptions
    ) -> None:
        shape = Shape.of(q, cache, self.capability, is_decode=False)
        tiles = prompts.tiles.get(shape.tokens)
        if tiles is None:
            tiles = prompts.tiles[shape.tokens] = self._send(_tiles(prompts.spans, shape.tokens))
        sinks = q if options.sinks is None else options.sinks
        has_bounds = prompts.row_bounds is not None and any(span.images_in(options.window) for span in prompts.spans)
        row_bounds = prompts.row_bounds if has_bounds else prompts.kv_lens
        prompt_kernel[(len(tiles[0]), shape.num_kv_heads)](
            *(q, cache.k, cache.v, out),
            *(prompts.tables, prompts.table_rows, prompts.kv_lens, prompts.rows, prompts.q_lens, *tiles),
            *(row_bounds, sinks),
            *_arguments(q, out, prompts.tables, cache, options),
            **self.constants(shape, cache, options, is_decode=False),
            HAS_BOUNDS=has_bounds,
        )

    def constants(self, shape: Shape, cache: LayerCache, options: LayerOptions, *, is_decode: bool) -> dict[str, Any]:
        """What a kernel is compiled with; ``HAS_BOUNDS`` is the prompts' own. The pools are as the kernel gets them."""
        of_decodes = {"SEGMENTS": SEGMENTS, "LEAST_SEGMENT": self.least_segment} if is_decode else {}
        return {
            **shape.constants,
            **of_decodes,
            "BLOCK": self.layout.block_size,
            "HAS_WINDOW": options.window is not None,
            "HAS_SOFTCAP": options.softcap is not None,
            "HAS_SINKS": options.sinks is not None,
            "IN_FLOAT32": self.capability == 0,  # the interpreter's products of bfloat16 are wrong
            "AS_BITS": cache.k.dtype == torch.uint8,
            "num_warps": 4 if is_decode else 8,
            "num_stages": 3 if is_decode else 2,
        }

    def _num_segments(self, num_keys: int) -> int:
        return min(SEGMENTS, max(1, -(-num_keys // self.least_segment)))

    def _tables(self, spans: list[Span], width: int) -> NDArray[np.int32]:
        tables = np.full((len(spans), width), self.layout.scratch_block, np.int32)
        for table, span in zip(tables, spans, strict=True):
            used = span.block_table[: -(-span.kv_len // self.layout.block_size)]
            table[: len(used)] = used
        return tables.ravel()

    def _send(self, parts: list[NDArray[np.int32]]) -> list[Tensor]:
        """To the device in one copy."""
        sizes = [-(-part.size // ALIGNMENT) * ALIGNMENT for part in parts]
        numbers = np.zeros(sum(sizes), np.int32)
        places = np.cumsum([0, *sizes])
        for part, place in zip(parts, places, strict=False):
            numbers[place : place + part.size] = part
        sent = send(numbers, self.layout.device)
        return [sent[place : place + part.size] for part, place in zip(parts, places, strict=False)]


def _bits(cache: LayerCache, factor: float = 1.0) -> LayerCache:
    """The same pools as bytes, and the scales times a factor."""
    k, v = cache.k.view(torch.uint8), cache.v.view(torch.uint8)
    return LayerCache(k, v, cache.k_scale * factor, cache.v_scale * factor)


def _arguments(q: Tensor, out: Tensor, tables: Tensor, cache: LayerCache, options: LayerOptions) -> tuple[float, ...]:
    """Strides and numbers, as both kernels take them. The scores' scale is to the base 2 unless there is a softcap."""
    scale = options.scaling * cache.k_scale * (1.0 if options.softcap is not None else LOG2_E.value)
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), tables.stride(0))
    return (*strides, scale, cache.v_scale, options.softcap or 1.0, options.window or 0)


def _numbers(rows: list[tuple[int, ...]]) -> list[NDArray[np.int32]]:
    """Columns of a table of three."""
    return list(np.array(rows, np.int32).reshape(-1, 3).T)


def _row_bounds(prompts: list[Span]) -> NDArray[np.int32] | None:
    """(rows of the packed step, 2): as ``Prompts`` has them; None if no row is of an image."""
    if not any(span.has_image_rows for span in prompts):
        return None
    bounds = np.zeros((max(span.row + span.q_len for span in prompts), 2), np.int32)
    for span in prompts:
        positions = np.arange(span.kv_len - span.q_len, span.kv_len)
        of_span = bounds[span.row : span.row + span.q_len]
        of_span[:, 0], of_span[:, 1] = positions + 1, NOWHERE.value
        for start, end in span.images:
            of_image = (positions >= start) & (positions < end)
            of_span[of_image] = (end, NOWHERE.value if span.only_in_windows else start)
    return bounds


def _tiles(spans: list[Span], num_tokens: int) -> list[NDArray[np.int32]]:
    """Each tile's span and first token, those that see most first: what is begun last should not take longest."""
    counts = [-(-span.q_len // num_tokens) for span in spans]
    firsts = np.concatenate([np.arange(count, dtype=np.int32) * num_tokens for count in counts])
    num_seen = firsts + np.repeat([span.kv_len - span.q_len for span in spans], counts)
    order = np.argsort(-num_seen, kind="stable")
    return [np.repeat(np.arange(len(spans), dtype=np.int32), counts)[order], firsts[order]]
