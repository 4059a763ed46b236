"""How near attention is to what the device can do: decodes to reading keys and values once, prompts to the products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.kernels import BLOCK_SIZE
from benchmarks.gpu.results import Row, attempt
from benchmarks.gpu.roofline import causal_pairs
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import finish, replayed, seconds
from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout, LayerCache, LayerOptions, Span

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
"""Of the 8B models."""
DECODES = tuple((rows, context) for context in (1024, 8192, 32768) for rows in (1, 8, 32, 128, 256))
MOST_BYTES = 12 * 2**30
"""Of keys and values: larger cases are left out."""
OUT_OF_CACHE = 256 * 2**20
"""Bytes that one round reads at least, from several layers' pools, so that it does not find them in the device's own
cache: a model's layers follow each other in the same way."""
PREFILLS = ((1024, 0), (4096, 0), (8192, 0), (4096, 4096), (2048, 30720))
TINY_DECODES, TINY_PREFILLS = ((1, 64), (4, 32)), ((64, 0), (16, 48))


def run(setting: Setting) -> Iterator[Row]:
    for rows, context in TINY_DECODES if setting.tiny else DECODES:
        if 2 * rows * context * NUM_KV_HEADS * HEAD_SIZE * setting.dtype.itemsize <= MOST_BYTES:
            yield from attempt(f"decode, {rows} x {context}", partial(_decode, setting, rows, context))
    for num_tokens, before in TINY_PREFILLS if setting.tiny else PREFILLS:
        yield from attempt(f"prefill, {num_tokens} behind {before}", partial(_prefill, setting, num_tokens, before))


def _make(setting: Setting, num_tokens: int, least_bytes: int = 0) -> tuple[AttentionBackend, list[LayerCache]]:
    """The backend, and layers' caches for so many tokens, as many as make ``least_bytes``."""
    layout = CacheLayout(BLOCK_SIZE, -(-num_tokens // BLOCK_SIZE), setting.device, setting.dtype)
    shape = (layout.num_slots, NUM_KV_HEADS, HEAD_SIZE)
    one = 2 * layout.num_slots * NUM_KV_HEADS * HEAD_SIZE * setting.dtype.itemsize
    caches = []
    for _ in range(max(1, -(-least_bytes // one))):
        k, v = (torch.randn(shape, device=setting.device, dtype=setting.dtype) for _ in range(2))
        caches.append(LayerCache(k, v))
    return backend_class(setting.backend, setting.device_type)(layout), caches


def _decode(setting: Setting, rows: int, context: int) -> Iterator[Row]:
    """Bytes of keys and values over the time of one layer, launched as in a captured step."""
    device = setting.device
    backend, caches = _make(setting, rows * context, 0 if setting.tiny else OUT_OF_CACHE)
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(rows * blocks, device=device).view(rows, blocks)
    q = torch.randn(rows, NUM_HEADS, HEAD_SIZE, device=device, dtype=setting.dtype)
    k = torch.randn(rows, NUM_KV_HEADS, HEAD_SIZE, device=device, dtype=setting.dtype)
    if backend.reads_device_lengths:
        lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
        plan = backend.plan_decode(tables.to(torch.int32), torch.arange(rows, device=device), lengths)
    else:
        plan = backend.plan([Span(i, 1, context, table) for i, table in enumerate(tables.tolist())])
    options = LayerOptions(HEAD_SIZE**-0.5)

    def all_layers() -> None:
        for cache in caches:
            backend.attend(q, k, k, cache, plan, options)

    took = seconds(replayed(all_layers, device), device) / len(caches)
    moved = 2 * rows * context * NUM_KV_HEADS * HEAD_SIZE * setting.dtype.itemsize
    limit = setting.limits.bytes_per_second / 1e9 or None
    note = f"{setting.backend}, {1e6 * took:.1f} us a layer"
    yield Row.of_rate(f"decode, {rows} x {context}", moved / took / 1e9, "GB/s", limit, note)


def _prefill(setting: Setting, num_tokens: int, before: int) -> Iterator[Row]:
    """Multiplications and additions that are needed over the time of one layer."""
    device, total = setting.device, num_tokens + before
    backend, caches = _make(setting, total)
    q = torch.randn(num_tokens, NUM_HEADS, HEAD_SIZE, device=device, dtype=setting.dtype)
    k = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_SIZE, device=device, dtype=setting.dtype)
    plan = backend.plan([Span(0, num_tokens, total, list(range(-(-total // BLOCK_SIZE))))])
    finish(device)
    options = LayerOptions(HEAD_SIZE**-0.5)
    took = seconds(lambda: backend.attend(q, k, k, caches[0], plan, options), device)
    flops = 4 * NUM_HEADS * HEAD_SIZE * causal_pairs(num_tokens, before)
    limit = setting.limits.flops / 1e12 or None
    note = f"{setting.backend}, {1e3 * took:.2f} ms a layer"
    yield Row.of_rate(f"prefill, {num_tokens} behind {before}", flops / took / 1e12, "TFLOP/s", limit, note)
