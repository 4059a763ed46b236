"""What can be tried without a Hopper GPU: refusals, what is left to Triton, what torch's function is told."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch.nn.attention.varlen import varlen_attn

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import CacheLayout, LayerCache, LayerOptions, Span
from lmserve.runtime.attention.fa3 import PAGED, Fa3Backend, Packed, arguments, lacking, pack, takes
from lmserve.runtime.attention.triton import TritonBackend, TritonPlan
from tests.runtime.test_attention import BLOCK_SIZE, CPU, NUM_BLOCKS, SCALING, Case, expected, make_case

CHUNKS_BEHIND_DECODES = ((11, 1), (64, 1), (0, 7), (16, 5), (9, 2))


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """What torch's function is documented to compute: rows and keys of a sequence are aligned at their ends."""
    assert (cu_seq_k, enable_gqa, num_splits) == (None, True, 1)
    assert {tensor.dtype for tensor in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    group = query.shape[1] // key.shape[2]
    out = torch.zeros(*query.shape[:2], value.shape[3], dtype=torch.float64)
    left, right = window_size
    for i, kv_len in enumerate(seqused_k.tolist()):
        begin, end = int(cu_seq_q[i]), int(cu_seq_q[i + 1])
        assert end - begin <= max_q
        assert kv_len <= max_k
        blocks = block_table[i].long()
        keys, values = (pages[blocks].flatten(0, 1)[:kv_len].double() for pages in (key, value))
        for row in range(begin, end):
            position = kv_len - end + row
            first = 0 if left < 0 else max(0, position - left)
            seen = slice(first, kv_len if right < 0 else position + right + 1)
            for head in range(query.shape[1]):
                weights = (keys[seen, head // group] @ query[row, head].double() * scale).softmax(0)
                out[row, head] = weights @ values[seen, head // group]
    return out


def plan_of(case: Case) -> TritonPlan:
    return TritonBackend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, case.q.dtype)).plan(case.spans)


def told(case: Case, options: LayerOptions) -> tuple[Packed, dict[str, Any]]:
    packed = pack(case.spans, CPU)
    prompts = plan_of(case).prompts
    assert packed is not None
    assert prompts is not None
    return packed, arguments(case.q, case.cache, prompts, packed, options, BLOCK_SIZE)


@pytest.mark.parametrize("window", [None, 1, 6])
def test_what_torch_is_told_gives_the_chunks_of_a_step(window: int | None) -> None:
    case, options = make_case(CHUNKS_BEHIND_DECODES), LayerOptions(SCALING, window)
    packed, named = told(case, options)
    assert packed.rows == slice(2, 16)
    torch.testing.assert_close(varlen(**named), expected(case, options)[packed.rows], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not inspect.signature(varlen_attn).parameters.keys() >= PAGED, reason="torch before 2.12")
def test_torch_knows_what_it_is_told() -> None:
    _, named = told(make_case(CHUNKS_BEHIND_DECODES), LayerOptions(SCALING))
    inspect.signature(varlen_attn).bind(**named)


def test_chunks_that_are_no_block_of_rows_are_not_packed() -> None:
    def spans(*lengths: int, images: tuple[tuple[int, int], ...] = ()) -> list[Span]:
        rows = [sum(lengths[:i]) for i in range(len(lengths))]
        return [Span(row, length, 40, [0] * 10, images) for row, length in zip(rows, lengths, strict=True)]

    assert pack(spans(1, 3, 4), CPU) is not None
    assert pack(spans(3, 4, 1), CPU) is not None
    assert pack(spans(3, 1, 4), CPU) is None
    assert pack(spans(1, 1), CPU) is None
    assert pack(spans(3, 4, images=((36, 40),)), CPU) is None


def test_layers_that_torch_cannot_do_are_left_to_triton() -> None:
    plain = LayerOptions(SCALING, window=7)
    q = torch.zeros(1, 4, 128, dtype=torch.bfloat16)
    pools = LayerCache(torch.zeros(8, 2, 128, dtype=torch.bfloat16), torch.zeros(8, 2, 128, dtype=torch.bfloat16))
    assert takes(q, pools, plain)
    assert not takes(q, pools, replace(plain, softcap=30.0))
    assert not takes(q, pools, replace(plain, sinks=torch.zeros(4)))
    assert not takes(q, replace(pools, v=pools.v[..., :64]), plain)
    assert not takes(q, LayerCache(pools.k.to(torch.float8_e4m3fn), pools.v.to(torch.float8_e4m3fn)), plain)
    for size in (20, 264):
        odd = torch.zeros(8, 2, size, dtype=torch.bfloat16)
        assert not takes(q.new_zeros(1, 4, size), LayerCache(odd, odd), plain)
    in_32_bits = LayerCache(pools.k.float(), pools.v.float())
    assert not takes(q.float(), in_32_bits, plain)


def test_it_says_what_is_missing() -> None:
    assert "2.12" in lacking(frozenset({"query", "enable_gqa"}), 9)
    assert "Hopper" in lacking(PAGED, 8)
    assert "Hopper" in lacking(PAGED, 10), "torch has it for no later GPU"
    assert lacking(PAGED | {"query"}, 9) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_it_refuses_a_machine_that_has_not_got_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.bfloat16)
    with pytest.raises(ModelLoadFailed, match="fa3 cannot be had: "):
        Fa3Backend(layout)
    monkeypatch.setattr("lmserve.runtime.attention.fa3.lacking", lambda parameters, major: "")
    with pytest.raises(ModelLoadFailed, match="the package flash-attn-3"):
        Fa3Backend(layout)


def test_chunks_are_torchs_and_the_rest_of_a_step_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, but that torch's function is the one above."""
    num_calls = 0

    def counted(**named: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return varlen(**named).to(named["query"].dtype)

    monkeypatch.setattr("lmserve.runtime.attention.fa3.lacking", lambda parameters, major: "")
    monkeypatch.setattr("lmserve.runtime.attention.fa3.current_flash_attention_impl", lambda: "FA3")
    monkeypatch.setattr("lmserve.runtime.attention.fa3.varlen_attn", counted)
    case = make_case(CHUNKS_BEHIND_DECODES, dtype=torch.bfloat16)
    backend = Fa3Backend(CacheLayout(BLOCK_SIZE, NUM_BLOCKS, CPU, torch.bfloat16))

    def check(case: Case, options: LayerOptions) -> None:
        found = backend.attend(case.q, case.k, case.v, case.cache, backend.plan(case.spans), options)
        torch.testing.assert_close(found.double(), expected(case, options), rtol=2e-2, atol=2e-2)

    check(case, LayerOptions(SCALING, window=6))
    check(case, LayerOptions(SCALING))
    assert num_calls == 2
    check(case, LayerOptions(SCALING, softcap=1.5))
    check(make_case(((0, 7), (11, 1), (16, 5)), dtype=torch.bfloat16), LayerOptions(SCALING))
    check(make_case(((11, 1), (3, 1)), dtype=torch.bfloat16), LayerOptions(SCALING))
    assert num_calls == 2
    monkeypatch.setattr("lmserve.runtime.attention.fa3.current_flash_attention_impl", lambda: None)
    check(case, LayerOptions(SCALING))
    assert num_calls == 2, "FlashAttention 2 must not be called"
