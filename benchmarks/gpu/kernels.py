"""Is attention right on this device? Every shape that models have, against the same sums in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.results import Row, attempt
from benchmarks.gpu.setting import Setting
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout, LayerCache, LayerOptions, Span

BLOCK_SIZE = 16
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
"""Of the largest difference in a row over the row's root mean square. Rounding the result alone makes a third of
it: the largest numbers are some five times the mean, and half a unit in the last place of bfloat16 is up to 2^-9."""
QUERIES = 256
"""Rows that the reference looks at together, for memory's sake."""
STEP = ((0, 1), (16, 1), (254, 1), (255, 1), (256, 1), (1023, 1), (4095, 1), (8190, 1), (0, 33), (100, 64), (3000, 700))
TINY_STEP = ((0, 1), (16, 1), (40, 1), (0, 7), (20, 12))
"""(tokens in the cache already, new ones) of each sequence: decodes, a prompt, and chunks behind others."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    in_fp8: bool = False
    """Keys and values in the cache."""


SHAPES = (
    Shape("heads 16 of 128, 8 kv", 16, 8, 128),
    Shape("heads 32 of 128, 8 kv", 32, 8, 128),
    Shape("heads 32 of 128, 4 kv", 32, 4, 128),
    Shape("heads 32 of 128, 8 kv, cache in fp8", 32, 8, 128, in_fp8=True),
    Shape("heads 32 of 64, 8 kv", 32, 8, 64),
    Shape("heads 8 of 256, 4 kv, window and softcap", 8, 4, 256, window=512, softcap=50.0),
    Shape("heads 64 of 64, 8 kv, window and sinks", 64, 8, 64, window=128, has_sinks=True),
    Shape("heads 32 of 80, 32 kv", 32, 32, 80),
    Shape("heads 32 of 128, 8 kv, float16", 32, 8, 128, torch.float16),
    Shape("heads 14 of 64, 2 kv, float32", 14, 2, 64, torch.float32),
)
TINY_SHAPES = (
    Shape("heads 4 of 16, 2 kv", 4, 2, 16, torch.float32),
    Shape("heads 4 of 16, 2 kv, window and softcap", 4, 2, 16, torch.float32, 6, 1.5),
    Shape("heads 4 of 16, 2 kv, sinks", 4, 2, 16, torch.float32, has_sinks=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One packed step over random keys and values that are in the cache, in scattered blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    spans: list[Span]
    options: LayerOptions


def run(setting: Setting) -> Iterator[Row]:
    for shape in TINY_SHAPES if setting.tiny else SHAPES:
        yield from attempt(f"error, {shape.name}", partial(check, setting, shape))


def check(setting: Setting, shape: Shape) -> Iterator[Row]:
    """How far a step of decodes and prompts is off, and whether a decode has the same bits alone."""
    name = setting.backend
    step = TINY_STEP if setting.tiny else STEP
    backend, case = make_case(name, shape, setting.device, step)
    if shape.in_fp8 and not backend.keeps_fp8:
        yield Row(f"error, {shape.name}", None, "", note=f"{name} keeps no 8 bits")
        return
    found, right = attended(backend, case), reference(case)
    error, tolerance = worst_error(found, right), TOLERANCE[shape.dtype]
    if not math.isfinite(error):
        raise ValueError("numbers came out that are none")
    yield Row(f"error, {shape.name}", error, "of a row's mean", tolerance, note=f"{name}; the limit is what is allowed")
    same = all(torch.equal(alone(backend, case, span), found[span.row]) for span in case.spans if span.q_len == 1)
    yield Row(f"decodes alone, {shape.name}", float(same), "bits equal", note=name)
    yield Row(f"writing, {shape.name}", float(writes_right(backend, case)), "bits equal", note=name)


def make_case(
    name: str, shape: Shape, device: torch.device, step: tuple[tuple[int, int], ...]
) -> tuple[AttentionBackend, Case]:
    """The backend by its name, and a step for it, the same in each run."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(shape.dtype)

    counts = [-(-(cached + new) // BLOCK_SIZE) for cached, new in step]
    cache_dtype = torch.float8_e4m3fn if shape.in_fp8 else None
    layout = CacheLayout(BLOCK_SIZE, sum(counts), device, shape.dtype, cache_dtype)
    pool = (layout.num_slots, shape.num_kv_heads, shape.head_size)
    cache = LayerCache(random(*pool).to(layout.pool_dtype), random(*pool).to(layout.pool_dtype), 1.0, 1.0)
    order = torch.randperm(layout.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    spans, row = [], 0
    for (cached, new), count in zip(step, counts, strict=True):
        table, order = order[:count], order[count:]
        spans.append(Span(row, new, cached + new, table))
        row += new
    sinks = random(shape.num_heads) if shape.has_sinks else None
    options = LayerOptions(shape.head_size**-0.5, shape.window, shape.softcap, sinks)
    new_rows = torch.cat([rows_of(span, device)[span.kv_len - span.q_len :] for span in spans])
    k, v = (pool.float()[new_rows].to(shape.dtype) for pool in (cache.k, cache.v))
    case = Case(random(row, shape.num_heads, shape.head_size), k, v, cache, spans, options)
    return backend_class(name, device.type)(layout), case


def attended(backend: AttentionBackend, case: Case) -> Tensor:
    """What the backend makes of it."""
    return backend.attend(case.q, case.k, case.v, case.cache, backend.plan(case.spans), case.options)


def worst_error(found: Tensor, right: Tensor) -> float:
    """The largest difference in a row over the row's root mean square, of the worst row: long contexts make small
    numbers, and their errors are not to hide behind the large ones of short contexts."""
    rows = (found.double() - right).flatten(1).abs().amax(1)
    return float((rows / right.flatten(1).square().mean(1).sqrt()).max())


def writes_right(backend: AttentionBackend, case: Case) -> bool:
    """Whether new keys and values get into their places in the cache, all bits of them, and nothing gets elsewhere."""
    device = case.q.device
    where = torch.cat([rows_of(span, device)[span.kv_len - span.q_len :] for span in case.spans])
    new = torch.randn(case.k.shape, generator=torch.Generator(device).manual_seed(2), device=device).to(case.k.dtype)
    written, expected = (
        LayerCache(case.cache.k.clone(), case.cache.v.clone(), case.cache.k_scale, case.cache.v_scale) for _ in range(2)
    )
    backend.write(new, -new, written, where)
    for pool, numbers in ((expected.k, new), (expected.v, -new)):
        pool.view(torch.uint8)[where] = numbers.to(pool.dtype).view(torch.uint8)
    pairs = ((written.k, expected.k), (written.v, expected.v))
    return all(torch.equal(found.view(torch.uint8), right.view(torch.uint8)) for found, right in pairs)


def alone(backend: AttentionBackend, case: Case, span: Span) -> Tensor:
    """A decode's row, computed without the others."""
    rows = slice(span.row, span.row + 1)
    plan = backend.plan([Span(0, 1, span.kv_len, span.block_table)])
    return backend.attend(case.q[rows], case.k[rows], case.v[rows], case.cache, plan, case.options)[0]


def reference(case: Case) -> Tensor:
    """In float64, of the numbers that are in the cache."""
    out = torch.zeros(case.q.shape, dtype=torch.float64, device=case.q.device)
    group = case.q.shape[1] // case.cache.k.shape[1]
    for span in case.spans:
        where = rows_of(span, case.q.device)
        keys = case.cache.k.float()[where].double().repeat_interleave(group, 1) * case.cache.k_scale
        values = case.cache.v.float()[where].double().repeat_interleave(group, 1) * case.cache.v_scale
        for first in range(0, span.q_len, QUERIES):
            count = min(QUERIES, span.q_len - first)
            rows = slice(span.row + first, span.row + first + count)
            positions = torch.arange(count, device=case.q.device) + span.kv_len - span.q_len + first
            out[rows] = _written_out(case.q[rows].double(), keys, values, positions, case.options)
    return out


def _written_out(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, options: LayerOptions) -> Tensor:
    """q (Q, heads, D) at positions (Q,); keys, values (K, heads, D)."""
    scores = torch.einsum("qhd,khd->hqk", q, keys) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    where = torch.arange(len(keys), device=q.device)
    seen = where <= positions[:, None]
    if options.window is not None:
        seen &= where > positions[:, None] - options.window
    scores = scores.masked_fill(~seen, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values)


def rows_of(span: Span, device: torch.device) -> Tensor:
    """The cache's rows of a sequence's tokens."""
    rows = torch.tensor(span.block_table, device=device)[:, None] * BLOCK_SIZE
    return (rows + torch.arange(BLOCK_SIZE, device=device)).flatten()[: span.kv_len]
