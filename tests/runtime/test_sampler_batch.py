"""A row gets the same token whoever stands beside it, and no operation between launch and collect waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmserve.runtime.sampler import SampledTokens, Sampler
from lmserve.runtime.sampling_state import SamplingState
from tests.runtime.recorded_graph import reason_to_wait
from tests.runtime.sampler_rows import MIXED, OUTPUT, VOCAB, give_slot, make_logits, make_sampler, sample

# One row, whoever stands beside it


def alone(row: int, logits: Tensor, position: int) -> SampledTokens:
    sampler, state = make_sampler(MIXED)
    return sample(sampler, state, logits[row : row + 1], [row], position)


def test_32_different_rows_get_exactly_what_each_gets_alone() -> None:
    logits = make_logits(32, 8)
    for position in (7, 8, 5000):
        sampler, state = make_sampler(MIXED)
        together = sample(sampler, state, logits, positions=position)
        assert together.logprobs is not None
        for row in range(32):
            single = alone(row, logits, position)
            assert single.token_ids[0] == together.token_ids[row], MIXED[row]
            if "logprobs" in MIXED[row]:
                assert single.logprobs is not None
                assert single.logprobs.chosen[0] == together.logprobs.chosen[row]
                assert torch.equal(single.logprobs.top_ids[0], together.logprobs.top_ids[row])
                assert torch.equal(single.logprobs.top[0], together.logprobs.top[row])


@pytest.mark.parametrize("seed", range(3))
def test_order_and_company_do_not_matter(seed: int) -> None:
    logits = make_logits(32, 9)
    sampler, state = make_sampler(MIXED)
    expected = sample(sampler, state, logits).token_ids
    some = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[: 32 - 9 * seed].tolist()
    sampler, state = make_sampler(MIXED)
    assert torch.equal(sample(sampler, state, logits[some], some).token_ids, expected[some])


def test_the_size_of_a_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(32, 10)
    results = []
    for elements in (1 << 15, 3 << 15, 7 << 15, 100 << 15):
        monkeypatch.setattr("lmserve.runtime.sampler._CHUNK_ELEMENTS_CPU", elements)
        sampler, state = make_sampler(MIXED)
        results.append([sample(sampler, state, logits, positions=position).token_ids.tolist() for position in (7, 8)])
    assert all(result == results[0] for result in results)


def test_bfloat16_logits_are_the_same_as_their_values_in_float32() -> None:
    logits = make_logits(32, 11).bfloat16()
    results = []
    for values in (logits, logits.float()):
        sampler, state = make_sampler(MIXED)
        results.append(sample(sampler, state, values).token_ids)
    assert torch.equal(results[0], results[1])


def test_a_preemption_does_not_show() -> None:
    """The slot given back with the output so far goes on as the one that was never taken away."""
    steps = [make_logits(32, 20 + i) for i in range(6)]
    sampler, state = make_sampler(MIXED)
    outputs = [list(OUTPUT) for _ in MIXED]
    for i, logits in enumerate(steps):
        for output, token_id in zip(
            outputs, sample(sampler, state, logits, positions=7 + i).token_ids.tolist(), strict=True
        ):
            output.append(token_id)
    sampler, state = make_sampler(list(reversed(MIXED)))  # other owners before
    for slot, row in enumerate(MIXED):
        give_slot(state, slot, output=tuple(outputs[slot][:6]), **{"seed": slot, **row})
    for i in range(3, 6):
        token_ids = sample(sampler, state, steps[i], positions=7 + i).token_ids.tolist()
        assert token_ids == [output[3 + i] for output in outputs]


def test_choices_of_one_seed_differ_and_repeat() -> None:
    logits = torch.zeros(4, VOCAB)
    runs = []
    for _ in range(2):
        state = SamplingState(max_num_seqs=4, vocab_size=VOCAB, device="cpu")
        for choice in range(4):
            give_slot(state, choice, choice, seed=5)
        runs.append(sample(Sampler(state), state, logits).token_ids.tolist())
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


# Between launch and collect nothing waits for the device


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Raises at operations that read values back or whose result's shape depends on values."""

    num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        reason = reason_to_wait(func, args, kwargs or {})
        if reason:
            raise AssertionError(reason)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "sync",
    [
        lambda t: t[0, 0].item(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: bool((t > 0).any()),
        lambda t: t.unique(),
    ],
)
def test_the_guard_sees_what_waits(sync: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():  # type: ignore[no-untyped-call]
        sync(torch.ones(2, 2))


def test_no_operation_waits_for_the_device() -> None:
    sampler, state = make_sampler(MIXED)
    slots, positions = torch.arange(32), torch.full((32,), 9)
    logits, mask = make_logits(32), torch.full((32, (VOCAB + 31) // 32), -1, dtype=torch.int32)
    with NoHostSync() as guard:  # type: ignore[no-untyped-call]
        sampler(logits, slots, positions, state.flags(range(32)), mask)
    assert guard.num_operations > 50


def test_it_runs_where_there_are_no_values_at_all() -> None:
    """On the meta device a read, a copy to the host or a shape made of values is an error."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(2, device="meta").tolist()
    state = SamplingState(max_num_seqs=32, vocab_size=VOCAB, device="meta")
    for slot, row in enumerate(MIXED):
        give_slot(state, slot, **row)
    slots, positions = (
        torch.empty(32, dtype=torch.int64, device="meta"),
        torch.empty(32, dtype=torch.int64, device="meta"),
    )
    sampled = Sampler(state)(torch.empty(32, VOCAB, device="meta"), slots, positions, state.flags(range(32)))
    assert sampled.token_ids.shape == (32,)
