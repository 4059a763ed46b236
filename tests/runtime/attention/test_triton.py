"""The kernels in Triton's interpreter, beyond what every backend has to do (``tests/runtime/test_attention.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from lmserve.runtime import transfer
from lmserve.runtime.attention.base import CacheLayout, LayerCache, LayerOptions, Span
from lmserve.runtime.attention.reference import ReferenceBackend
from lmserve.runtime.attention.triton import SEGMENTS, Decodes, Shape, TritonBackend, _tiles
from lmserve.runtime.kv_cache import KVCache, LayerShape
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
    case = make_case(((9, 3), (199, 1), (63, 1), (64, 1), (7, 1)))
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


def every_number() -> torch.Tensor:
    """All that 8 bits can hold, what lies in the middle between two of them and close to it, and what is too large."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    positive = torch.cat([numbers, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), torch.tensor([449, 1e9])])
    return torch.cat([positive, -positive]).float()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_writing_in_8_bits(scale: float) -> None:
    numbers = every_number() * scale
    k = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 64)]).view(-1, 4, 16)
    num_tokens = len(k)
    layout = CacheLayout(4, -(-num_tokens // 4), CPU, torch.float32)
    kept = []
    for backend in (TritonBackend(layout), ReferenceBackend(layout)):
        pools = [torch.zeros(layout.num_slots, 4, 16).to(torch.float8_e4m3fn) for _ in range(2)]
        backend.write(k, -k, LayerCache(pools[0], pools[1], scale, scale), torch.arange(num_tokens))
        kept.append(torch.cat(pools, dim=2))
    assert torch.equal(*(rows.view(torch.uint8) for rows in kept))
    assert kept[0].double().abs().max() == 448


def test_writing_in_8_bits_by_the_gpus_own_conversion() -> None:
    """As the reference, but for the interpreter, which halves what is rounded up to a power of two."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(9, 3, size, generator=generator) for size in (24, 16))
    k[0, 0, 0] = 1e9
    layout = CacheLayout(4, 9, CPU, torch.float32)
    converting = TritonBackend(layout)
    converting.capability = 90
    kept = []
    for backend in (converting, ReferenceBackend(layout)):
        k_pool, v_pool = (torch.zeros(40, 3, size).to(torch.float8_e4m3fn) for size in (24, 16))
        backend.write(k, v, LayerCache(k_pool, v_pool, k_scale=0.5, v_scale=0.02), torch.arange(9))
        kept.append(torch.cat([k_pool[:9].float() * 0.5, v_pool[:9].float() * 0.02], dim=2))
    found, wanted = kept
    assert (found == wanted).double().mean() > 0.95
    assert found[0, 0, 0] == 224
    torch.testing.assert_close(found, wanted, rtol=0.51, atol=1e-3)


@pytest.mark.parametrize("capability", [0, 90])
@pytest.mark.parametrize("options", [PLAIN, OPTIONS["window, softcap and sinks"]], ids=["plain", "everything"])
def test_reading_8_bits_over_several_segments(options: LayerOptions, capability: int) -> None:
    """As bits, and by the GPU's own conversion; the scales are those of the parts that are put together, too."""
    case = make_case(((3, 9), (100, 1), (40, 1)))
    pools = [pool.clamp(-40, 40).to(torch.float8_e4m3fn) for pool in (case.cache.k, case.cache.v)]
    cache = LayerCache(pools[0], pools[1], k_scale=0.5, v_scale=0.02)
    backend = ShortSegments(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    plan = backend.plan(case.spans)
    backend.capability = capability
    reference = ReferenceBackend(backend.layout)
    wanted = reference.attend(case.q, case.k, case.v, cache, reference.plan(case.spans), options)
    assert backend.as_bits(cache) == (capability == 0)
    assert_close(backend.attend(case.q, case.k, case.v, cache, plan, options), wanted.double())


class NewMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts the numbers that memory is asked for. The interpreter's own copies are none of it."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.num_elements += made.numel()
        return made


def test_parts_of_decodes_take_no_memory_for_the_rows_of_prompts() -> None:
    case = make_case(((0, 60), (100, 1)))
    backend = ShortSegments(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    plan = backend.plan(case.spans)
    with NewMemory() as new:  # type: ignore[no-untyped-call]
        found = backend.attend(case.q, case.k, case.v, case.cache, plan, PLAIN)
    assert new.num_elements == found.numel() + 4 * SEGMENTS * (16 + 2)
    assert_close(found, expected(case, PLAIN))


@pytest.fixture
def _new_memory_holds_no_numbers() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_new_memory_holds_no_numbers")
@pytest.mark.parametrize("num_padded", [0, 3])
def test_every_row_is_written_or_zero(num_padded: int) -> None:
    case = make_case(((30, 1), (5, 6)), heads=6)
    q, k, v = (torch.cat([x, x.new_ones(num_padded, *x.shape[1:])]) for x in (case.q, case.k, case.v))
    assert torch.empty(3).isnan().all(), "or this test proves nothing"
    backend = ShortSegments(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    found = backend.attend(q, k, v, case.cache, backend.plan(case.spans), PLAIN)
    assert_close(found[:7], expected(case, PLAIN))
    assert not found[7:].any()
    tables, lengths = torch.full((4, 8), NUM_BLOCKS, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    plan = backend.plan_decode(tables, torch.arange(4), lengths)
    assert not backend.attend(q[:4], k[:4], v[:4], case.cache, plan, PLAIN).any(), "padding"


def test_a_step_crosses_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more, in its first layer, where the tiles of prompts are."""
    sent: list[int] = []
    real = transfer.send

    def counted(numbers: NDArray[np.int32], device: torch.device) -> torch.Tensor:
        sent.append(numbers.size)
        return real(numbers, device)

    monkeypatch.setattr("lmserve.runtime.attention.triton.send", counted)
    case = make_case(((0, 7), (30, 1), (5, 6)), images=(((2, 5),), (), ()))
    backend = TritonBackend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    plan = backend.plan(case.spans)
    assert len(sent) == 1
    for _ in range(3):
        backend.attend(case.q, case.k, case.v, case.cache, plan, PLAIN)
    assert len(sent) == 2


def test_what_takes_longest_is_begun_first() -> None:
    spans = [Span(0, 40, 40, [0] * 10), Span(40, 20, 90, [0] * 23)]
    span, first = _tiles(spans, 16)
    assert list(zip(span.tolist(), first.tolist(), strict=True)) == [(1, 16), (1, 0), (0, 32), (0, 16), (0, 0)]
    assert span.dtype == first.dtype == np.int32


def test_what_a_launch_reads_is_aligned_to_16_bytes() -> None:
    """Or copies of 16 bytes, for which ``test_triton_compiled.py`` looks, would be none."""
    case = make_case(((70, 1), (11, 1), (5, 9)))
    backend = TritonBackend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.float32))
    plan = backend.plan(case.spans)
    assert plan.decodes is not None
    assert plan.prompts is not None
    sent = [plan.decodes.tables, plan.decodes.rows, plan.decodes.kv_lens, plan.prompts.tables, plan.prompts.q_lens]
    base = min(tensor.data_ptr() for tensor in sent)
    assert all((tensor.data_ptr() - base) % 16 == 0 for tensor in sent)
    assert plan.decodes.tables.stride(0) % 4 == 0
    cache = KVCache({0: LayerShape(8, 128, 64)}, backend.layout).layers[0]
    assert all(pool.data_ptr() % 16 == 0 and pool.is_contiguous() for pool in (cache.k, cache.v))


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_decode", [True, False])
def test_tiles_are_what_products_take_and_shrink_with_the_heads(
    capability: int, dtype: torch.dtype, is_decode: bool
) -> None:
    sizes = []
    for head_size in (16, 64, 80, 128, 256, 576):
        q, pool = torch.empty(1, 8, head_size, dtype=dtype), torch.empty(4, 2, head_size, dtype=dtype)
        shape = Shape.of(q, LayerCache(pool, pool), capability, is_decode=is_decode)
        assert 16 <= shape.rows <= 128
        assert 16 <= shape.keys <= 64
        sizes.append((shape.rows, shape.keys))
    assert sizes == sorted(sizes, reverse=True)
    assert (
        sizes[3]
        == {
            (True, torch.bfloat16): (16, 64),
            (True, torch.float32): (16, 32),
            (False, torch.bfloat16): (128, 64 if capability >= 90 else 32),
            (False, torch.float32): (32, 32 if capability >= 90 else 16),
        }[is_decode, dtype]
    )
