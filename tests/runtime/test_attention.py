"""The conformance suite: every backend in the table against attention written out one query at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention import BACKENDS, NEEDS, backend_class, best_for
from lmserve.runtime.attention.base import AttentionBackend, CacheLayout, LayerCache, LayerOptions, Span
from lmserve.runtime.attention.sdpa import bucket_length

BLOCK_SIZE = 4
NUM_BLOCKS = 96
CPU = torch.device("cpu")

INSTALLED = [name for name in BACKENDS if name not in NEEDS or find_spec(NEEDS[name])]
BACKENDS_HERE = [name for name in INSTALLED if backend_class(name, "cpu").runs_on_cpu]

# (tokens in the cache already, new tokens): decodes of several lengths, whole prompts, chunks behind a prefix
MIXED = ((0, 7), (11, 1), (3, 1), (64, 1), (70, 1), (16, 5), (0, 1), (9, 2))
# the same, and where each has images: within a step, at its end, none, cached up to the last token (beside the decode
# before it, which reads as many blocks where there is a window), to the middle, before and behind the step
WITH_IMAGES = ((0, 20), (6, 10), (8, 1), (9, 1), (3, 15), (70, 4), (11, 1), (0, 7))
IMAGES = (((3, 9), (12, 20)), ((2, 11),), (), ((3, 10),), ((0, 8), (9, 12), (20, 30)), ((60, 72),), ((2, 8),), ())
SCALING = 0.3


@dataclass
class Case:
    """One packed step over random keys and values that lie in scattered blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    spans: list[Span]
    sequences: list[tuple[Tensor, Tensor]]
    """Each sequence's own keys and values, contiguous: what the expected result is computed from."""


def make_case(
    sequences: tuple[tuple[int, int], ...],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    key_size: int = 16,
    value_size: int = 16,
    dtype: torch.dtype = torch.float32,
    scattered: bool = True,
    seed: int = 0,
    images: tuple[tuple[tuple[int, int], ...], ...] = (),
    only_in_windows: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    # blocks that nobody owns hold large numbers: reading one shows
    cache = LayerCache(
        k=random((NUM_BLOCKS + 1) * BLOCK_SIZE, kv_heads, key_size) * 50,
        v=random((NUM_BLOCKS + 1) * BLOCK_SIZE, kv_heads, value_size) * 50,
    )
    order = torch.randperm(NUM_BLOCKS, generator=generator).tolist() if scattered else list(range(NUM_BLOCKS))
    spans, new_k, new_v, contents, row = [], [], [], [], 0
    for (cached, new), runs in zip(sequences, images or ((),) * len(sequences), strict=True):
        total = cached + new
        table, order = order[: math.ceil(total / BLOCK_SIZE)], order[math.ceil(total / BLOCK_SIZE) :]
        k, v = random(total, kv_heads, key_size), random(total, kv_heads, value_size)
        slots = torch.tensor([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(total)])
        cache.k[slots], cache.v[slots] = k, v
        spans.append(Span(row, new, total, table, runs, only_in_windows))
        new_k.append(k[cached:])
        new_v.append(v[cached:])
        contents.append((k, v))
        row += new
    return Case(random(row, heads, key_size), torch.cat(new_k), torch.cat(new_v), cache, spans, contents)


def seen_from(position: int, span: Span, window: int | None) -> list[int]:
    """What stands before it, as far as the window goes back, and its own image."""
    [together] = [range(*image) for image in span.images if position in range(*image)] or [range(0)]
    first = 0 if window is None else max(0, position - window + 1)
    if span.only_in_windows:
        together = range(0) if window is None else range(max(first, together.start), together.stop)
    return [key for key in range(span.kv_len) if first <= key <= position or key in together]


def expected(case: Case, options: LayerOptions) -> Tensor:
    """One query, one head, one key at a time."""
    heads = case.q.shape[1]
    out = torch.zeros(*case.q.shape[:2], case.v.shape[-1], dtype=torch.float64)
    for span, (k, v) in zip(case.spans, case.sequences, strict=True):
        group = heads // k.shape[1]
        for i in range(span.q_len):
            position = span.kv_len - span.q_len + i
            seen = seen_from(position, span, options.window)
            for h in range(heads):
                keys = k[seen, h // group].double()
                scores = keys @ case.q[span.row + i, h].double() * options.scaling
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if options.sinks is None else options.sinks[h].double().exp())
                out[span.row + i, h] = (weights / total) @ v[seen, h // group].double()
    return out


def make_backend(name: str, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    return backend_class(name, "cpu")(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, dtype))


def run(name: str, case: Case, options: LayerOptions) -> Tensor:
    backend = make_backend(name, case.q.dtype)
    return backend.attend(case.q, case.k, case.v, case.cache, backend.plan(case.spans), options)


OPTIONS = {
    "plain": LayerOptions(SCALING),
    "window": LayerOptions(SCALING, window=6),
    "window of one": LayerOptions(SCALING, window=1),
    "softcap": LayerOptions(SCALING, softcap=1.5),
    "sinks": LayerOptions(SCALING, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "window, softcap and sinks": LayerOptions(SCALING, 5, 2.0, torch.tensor([1.0, 0.0, -2.0, 3.0])),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", BACKENDS_HERE)
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "adjacent"])
def test_mixed_step(name: str, options: LayerOptions, scattered: bool) -> None:
    case = make_case(MIXED, scattered=scattered)
    torch.testing.assert_close(run(name, case, options).double(), expected(case, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", BACKENDS_HERE)
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "adjacent"])
@pytest.mark.parametrize("only_in_windows", [False, True], ids=["everywhere", "in windows"])
def test_tokens_of_an_image_see_each_other(
    name: str, options: LayerOptions, scattered: bool, only_in_windows: bool
) -> None:
    case = make_case(WITH_IMAGES, scattered=scattered, images=IMAGES, only_in_windows=only_in_windows)
    found = run(name, case, options).double()
    torch.testing.assert_close(found, expected(case, options), rtol=1e-5, atol=1e-5)
    blind = make_case(WITH_IMAGES, scattered=scattered)
    sees_nothing_more = only_in_windows and options.window is None
    assert torch.allclose(found, expected(blind, options), atol=1e-2) == sees_nothing_more


@pytest.mark.parametrize("name", BACKENDS_HERE)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("only_in_windows", [False, True])
def test_where_a_prefix_of_an_image_was_cached_makes_no_difference(
    name: str, window: int | None, only_in_windows: bool
) -> None:
    options = LayerOptions(SCALING, window)
    whole = make_case(((0, 20),), images=(((5, 17),),), only_in_windows=only_in_windows)
    expected_rows = run(name, whole, options)
    for cached in range(1, 20):
        [span] = whole.spans
        rest = Case(
            whole.q[cached:],
            whole.k[cached:],
            whole.v[cached:],
            whole.cache,
            [Span(0, 20 - cached, 20, span.block_table, span.images, only_in_windows)],
            whole.sequences,
        )
        torch.testing.assert_close(run(name, rest, options), expected_rows[cached:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS_HERE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 1), (6, 3)])
@pytest.mark.parametrize(("key_size", "value_size"), [(16, 16), (24, 16), (8, 8)])
def test_head_shapes(name: str, heads: int, kv_heads: int, key_size: int, value_size: int) -> None:
    case = make_case(MIXED, heads=heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size)
    options = LayerOptions(SCALING)
    torch.testing.assert_close(run(name, case, options).double(), expected(case, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_bfloat16(name: str, options: LayerOptions) -> None:
    case = make_case(MIXED, dtype=torch.bfloat16)
    torch.testing.assert_close(run(name, case, options).double(), expected(case, options), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_a_decode_gives_the_same_bits_in_any_company(name: str, dtype: torch.dtype) -> None:
    case = make_case(((40, 1), (64, 1), (90, 1), (37, 1), (5, 1)), dtype=dtype)
    options = LayerOptions(SCALING)
    together = run(name, case, options)
    for i, span in enumerate(case.spans):
        backend = make_backend(name, dtype)
        alone = backend.attend(
            case.q[i : i + 1],
            case.k[i : i + 1],
            case.v[i : i + 1],
            case.cache,
            backend.plan([Span(0, 1, span.kv_len, span.block_table)]),
            options,
        )
        assert torch.equal(alone[0], together[i])


WITH_DEVICE_LENGTHS = [name for name in BACKENDS_HERE if backend_class(name, "cpu").reads_device_lengths]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", WITH_DEVICE_LENGTHS)
def test_a_plan_for_decodes_reads_what_its_tensors_hold_later(name: str, options: LayerOptions) -> None:
    """One plan; then other lengths, another order of tables, and a row of padding at the end."""
    case = make_case(((11, 1), (3, 1), (64, 1), (70, 1), (0, 1)))
    num_rows, width = len(case.spans), 20
    tables = torch.full((9, width), NUM_BLOCKS, dtype=torch.int32)
    rows, lengths = torch.zeros(num_rows + 1, dtype=torch.int64), torch.zeros(num_rows + 1, dtype=torch.int32)
    backend = make_backend(name)
    plan = backend.plan_decode(tables, rows, lengths)
    for order in ([3, 8, 0, 2, 5], [1, 2, 3, 4, 5]):
        tables.fill_(NUM_BLOCKS)
        for row, span in zip(order, case.spans, strict=True):
            tables[row, : len(span.block_table)] = torch.tensor(span.block_table)
        rows[:num_rows] = torch.tensor(order)
        lengths[:num_rows] = torch.tensor([span.kv_len for span in case.spans])
        q, k, v = (torch.cat([x, x[:1]]) for x in (case.q, case.k, case.v))
        found = backend.attend(q, k, v, case.cache, plan, options)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:num_rows].double(), expected(case, options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BACKENDS_HERE if backend_class(name, "cpu").keeps_fp8])
def test_keys_and_values_in_8_bits(name: str, dtype: torch.dtype) -> None:
    case = make_case(((11, 1), (64, 1), (3, 9)), dtype=dtype)
    size = (NUM_BLOCKS + 1) * BLOCK_SIZE, 2, 16
    k_pool, v_pool = (torch.zeros(size).to(torch.float8_e4m3fn) for _ in range(2))
    cache = LayerCache(k_pool, v_pool, k_scale=0.5, v_scale=0.02)
    backend = make_backend(name, dtype)
    rounded = []
    for span, (k, v) in zip(case.spans, case.sequences, strict=True):
        positions = torch.arange(span.kv_len)
        slots = torch.tensor(span.block_table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        make_backend("reference", dtype).write(k, v, cache, slots)
        scaled = ((k, cache.k_scale), (v, cache.v_scale))
        kept_k, kept_v = ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale for x, scale in scaled)
        rounded.append((kept_k, kept_v))
    for options in (OPTIONS["plain"], OPTIONS["window, softcap and sinks"]):
        found = backend.attend(case.q, case.k, case.v, cache, backend.plan(case.spans), options)
        wanted = expected(Case(case.q, case.k, case.v, cache, case.spans, rounded), options)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(found.double(), expected(case, options), rtol=1e-3, atol=1e-3), "nothing was rounded"


def test_the_best_backend_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (best_for("cpu"), best_for("mps"), best_for("cuda")) == ("cpu", "sdpa", "triton")
    assert [best_for("cuda", capability) for capability in ((7, 5), (8, 0), (12, 0))] == ["sdpa", "triton", "triton"]
    monkeypatch.setitem(NEEDS, "triton", "a_package_that_is_not_there")
    assert best_for("cuda") == "sdpa"
    assert backend_class("auto", "cuda").name == "sdpa"
    with pytest.raises(ModelLoadFailed, match="triton needs the package a_package_that_is_not_there"):
        backend_class("triton", "cuda")


@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_rows_beyond_the_spans_are_finite(name: str) -> None:
    case = make_case(((5, 1),))
    q, k, v = (torch.cat([x, x.new_full((3, *x.shape[1:]), 0.5)]) for x in (case.q, case.k, case.v))
    backend = make_backend(name)
    out = backend.attend(q, k, v, case.cache, backend.plan(case.spans), LayerOptions(SCALING))
    assert out.shape[0] == 4
    assert out.isfinite().all()


def test_bucket_length_wastes_at_most_a_quarter_of_long_contexts() -> None:
    for num_keys in range(1, 9000):
        padded = bucket_length(num_keys)
        assert padded >= num_keys
        assert padded - num_keys < max(64, num_keys / 4)
    assert [bucket_length(n) for n in (1, 64, 65, 512, 513, 1025)] == [64, 64, 128, 512, 640, 1280]


def test_unknown_backend() -> None:
    with pytest.raises(KeyError):
        backend_class("fast", "cpu")
