"""The kernels in Triton's interpreter, beyond what every backend has to do (``tests/runtime/test_attention.py``)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lmserve.runtime.attention.base import CacheLayout, LayerCache, LayerOptions
from lmserve.runtime.attention.reference import ReferenceBackend
from lmserve.runtime.attention.triton import SEGMENTS, Decodes, Shape, TritonBackend
from tests.runtime.test_attention import (
    BLOCK_SIZE,
    CPU,
    NUM_BLOCKS,
    OPTIONS,
    SCALING,
    Case,
    expected,
    make_case,
)

PLAIN = LayerOptions(SCALING)


class ShortSegments(TritonBackend):
    """Contexts of a test fall into several segments, each as short as the keys that are looked at together."""

    least_segment = 16


def run(backend: type[TritonBackend], case: Case, options: LayerOptions = PLAIN) -> torch.Tensor:
    made = backend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, case.q.dtype))
    return made.attend(case.q, case.k, case.v, case.cache, made.plan(case.spans), options)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_context_of_several_segments(options: LayerOptions) -> None:
    case = make_case(((199, 1), (63, 1), (64, 1), (7, 1), (9, 3)))
    assert_close(run(ShortSegments, case, options), expected(case, options))


def test_a_window_of_several_segments() -> None:
    options = LayerOptions(SCALING, window=80)
    case = make_case(((210, 1), (79, 1), (80, 1)))
    assert_close(run(ShortSegments, case, options), expected(case, options))


@pytest.mark.parametrize("options", [PLAIN, OPTIONS["sinks"]], ids=["plain", "sinks"])
def test_how_a_context_is_cut_hangs_on_its_length_alone(options: LayerOptions) -> None:
    """Not on the company, nor on the segments that are launched: a captured step launches for the longest context."""
    case = make_case(((200, 1), (90, 1), (30, 1)))
    backend = ShortSegments(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    together = run(ShortSegments, case, options)
    width = NUM_BLOCKS
    tables = torch.full((5, width), NUM_BLOCKS, dtype=torch.int32)
    rows = torch.tensor([4, 0, 2])
    for row, span in zip(rows, case.spans, strict=True):
        tables[row, : len(span.block_table)] = torch.tensor(span.block_table)
    lengths = torch.tensor([span.kv_len for span in case.spans], dtype=torch.int32)
    plan = backend.plan_decode(tables, rows, lengths)
    assert isinstance(plan.decodes, Decodes)
    assert plan.decodes.num_segments == SEGMENTS > backend.plan(case.spans[1:]).decodes.num_segments  # type: ignore[union-attr]
    assert torch.equal(backend.attend(case.q, case.k, case.v, case.cache, plan, options), together)
    for i in range(3):
        alone = Case(case.q[i : i + 1], case.k, case.v, case.cache, [case.spans[i]], case.sequences)
        alone.spans[0] = type(case.spans[i])(0, 1, case.spans[i].kv_len, case.spans[i].block_table)
        assert torch.equal(run(ShortSegments, alone, options)[0], together[i])


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 1), (20, 1)])
@pytest.mark.parametrize(("key_size", "value_size"), [(80, 80), (96, 64), (192, 128)])
def test_shapes_of_models(heads: int, kv_heads: int, key_size: int, value_size: int) -> None:
    case = make_case(((20, 1), (3, 9)), heads=heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size)
    assert_close(run(TritonBackend, case, LayerOptions(0.1)), expected(case, LayerOptions(0.1)))


def test_float16() -> None:
    case = make_case(((40, 1), (5, 6)), dtype=torch.float16)
    assert_close(run(TritonBackend, case), expected(case, PLAIN), 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writing_puts_each_token_into_its_row_and_leaves_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, 5, size, generator=generator).to(dtype).transpose(0, 1) for size in (24, 16))
    cache = LayerCache(torch.full((40, 3, 24), 7.0, dtype=dtype), torch.full((40, 3, 16), 7.0, dtype=dtype))
    slots = torch.tensor([9, 0, -1, 39, 17])
    TritonBackend(CacheLayout(4, 9, CPU, dtype)).write(k, v, cache, slots)
    kept = slots >= 0
    for pool, new in ((cache.k, k), (cache.v, v)):
        assert torch.equal(pool[slots[kept]], new[kept])
        assert int((pool != 7.0).any(-1).any(-1).sum()) == 4


def test_writing_in_8_bits() -> None:
    """As the reference, but for the interpreter, which halves what is rounded up to a power of two."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(9, 3, size, generator=generator) for size in (24, 16))
    layout = CacheLayout(4, 9, CPU, torch.float32)
    kept = []
    for backend in (TritonBackend(layout), ReferenceBackend(layout)):
        keys, values = (torch.zeros(40, 3, size).to(torch.float8_e4m3fn) for size in (24, 16))
        cache = LayerCache(keys, values, k_scale=0.5, v_scale=0.02)
        backend.write(k, v, cache, torch.arange(9))
        kept.append(torch.cat([cache.k[:9].float() * 0.5, cache.v[:9].float() * 0.02], dim=2))
    found, wanted = kept
    assert (found == wanted).double().mean() > 0.95
    torch.testing.assert_close(found, wanted, rtol=0.51, atol=1e-3)


def test_what_a_launch_reads_is_aligned_to_16_bytes() -> None:
    """So that it loads 16 bytes at a time, as ``test_triton_compiled.py`` assumes."""
    case = make_case(((70, 1), (11, 1), (5, 9)))
    backend = TritonBackend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    plan = backend.plan(case.spans)
    assert plan.decodes is not None
    assert plan.prompts is not None
    sent = [plan.decodes.tables, plan.decodes.rows, plan.decodes.kv_lens, plan.prompts.tables, plan.prompts.q_lens]
    base = min(tensor.data_ptr() for tensor in sent)
    assert all((tensor.data_ptr() - base) % 16 == 0 for tensor in sent)
    assert plan.decodes.tables.stride(0) % 4 == 0
    q = torch.empty(1, 32, 4, 128, dtype=torch.bfloat16)[0].transpose(0, 1)
    pool = torch.empty(16, 8, 128, dtype=torch.bfloat16)
    shape = Shape.of(q, LayerCache(pool, pool), 90, is_decode=True)
    assert all(stride % 16 == 0 for stride in (q.stride(0), q.stride(1), *pool.stride()[:2]))
    assert (shape.constants["D1"], shape.constants["D2"], shape.constants["DVP"]) == (128, 0, 128)
