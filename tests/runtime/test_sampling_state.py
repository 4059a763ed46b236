"""What a slot remembers, and that nothing of it outlives its owner."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lmserve.runtime.noise import request_key
from lmserve.runtime.sampling_state import Need, SamplingState, TokenValues
from lmserve.sampling_params import SamplingParams

VOCAB = 50


def make_state(max_num_seqs: int = 4) -> SamplingState:
    return SamplingState(max_num_seqs=max_num_seqs, vocab_size=VOCAB, device="cpu")


def set_slot(
    state: SamplingState,
    slot: int,
    *,
    choice: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    eos: tuple[int, ...] = (0,),
    **sampling: Any,
) -> None:
    state.set_slot(slot, SamplingParams(max_tokens=10, **sampling), choice, prompt, output, eos)


@pytest.mark.parametrize(
    ("sampling", "needs"),
    [
        ({}, Need.SAMPLE),
        ({"temperature": 0}, Need.NONE),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "typical_p": 0.5}, Need.NONE),
        ({"top_p": 0.5}, Need.SAMPLE | Need.TOP_P),
        ({"top_k": 3}, Need.SAMPLE | Need.TOP_K),
        ({"top_k": 3, "top_p": 0.5}, Need.SAMPLE | Need.TOP_K | Need.TOP_P_OF_K),
        ({"top_k": VOCAB, "top_p": 0.5}, Need.SAMPLE | Need.TOP_P),
        ({"min_p": 0.1, "typical_p": 0.5}, Need.SAMPLE | Need.MIN_P | Need.TYPICAL_P),
        ({"temperature": 0, "presence_penalty": -1.0}, Need.COUNTS),
        ({"temperature": 0, "frequency_penalty": 0.1}, Need.COUNTS),
        ({"temperature": 0, "repetition_penalty": 1.1}, Need.SEEN),
        ({"temperature": 0, "logit_bias": ((3, 1.0),)}, Need.BIAS),
        ({"temperature": 0, "min_tokens": 2}, Need.MIN_TOKENS),
        ({"temperature": 0, "logprobs": 0}, Need.LOGPROBS),
    ],
)
def test_needs_are_what_the_parameters_ask_for(sampling: dict[str, Any], needs: Need) -> None:
    state = make_state()
    set_slot(state, 2, **sampling)
    flags = state.flags([2, 0])
    assert flags.needs == (needs, Need.NONE)
    assert flags.union == needs
    assert flags.top_k == (3 if Need.TOP_K in needs else 0, 0)


def test_params_are_the_rows_of_the_slots_asked_for() -> None:
    state = make_state()
    set_slot(state, 3, temperature=0.5, top_p=0.9, min_p=0.1, typical_p=0.8, top_k=7, choice=2, seed=-5)
    set_slot(
        state, 1, temperature=0, repetition_penalty=1.5, presence_penalty=-1.0, frequency_penalty=2.0, min_tokens=4
    )
    params = state.params(torch.tensor([3, 1]))
    expected = {
        "temperature": [0.5, 1.0],
        "top_p": [0.9, 1.0],
        "min_p": [0.1, 0.0],
        "typical_p": [0.8, 1.0],
        "repetition_penalty": [1.0, 1.5],
        "presence_penalty": [0.0, -1.0],
        "frequency_penalty": [0.0, 2.0],
        "top_k": [7, VOCAB],
        "first_end_position": [0, 2 + 4],
    }
    for name, values in expected.items():
        assert getattr(params, name)[:, 0].tolist() == pytest.approx(values), name
    assert state.request_keys[3].tolist() == list(request_key(-5, 2))


def test_the_smallest_temperature_stays_above_zero() -> None:
    state = make_state()
    set_slot(state, 0, temperature=5e-324)
    assert state.params(torch.tensor([0])).temperature.item() > 0


def test_matrices_are_made_when_first_asked_for() -> None:
    plain, counting = make_state(), make_state()
    set_slot(plain, 0, top_p=0.5)
    set_slot(counting, 1, presence_penalty=1.0)
    assert (plain.counts, plain.seen) == (None, None)
    assert counting.counts is not None
    assert counting.seen is None


def test_a_slot_knows_its_tokens_as_if_it_had_never_been_preempted() -> None:
    penalties: dict[str, Any] = {"presence_penalty": 1.0, "repetition_penalty": 1.1}
    going, back = make_state(), make_state()
    set_slot(going, 1, prompt=(5, 6, 6), **penalties)
    for token_id in (7, 7, 8):
        going.record(torch.tensor([1]), torch.tensor([token_id]), Need.COUNTS | Need.SEEN)
    set_slot(back, 1, prompt=(9, 9), output=(10,), **penalties)  # an earlier owner
    set_slot(back, 1, prompt=(5, 6, 6), output=(7, 7, 8), **penalties)
    for state in (going, back):
        assert state.counts is not None
        assert state.seen is not None
        counts = {i: int(n) for i, n in enumerate(state.counts[1].tolist()) if n}
        assert counts == {7: 2, 8: 1}
        assert [i for i, is_seen in enumerate(state.seen[1].tolist()) if is_seen] == [5, 6, 7, 8]


def test_record_touches_only_the_rows_given_and_skips_what_nobody_asks_for() -> None:
    state = make_state()
    for slot in (0, 1, 2):
        set_slot(state, slot, frequency_penalty=1.0)
    assert state.counts is not None
    state.record(torch.tensor([2, 0]), torch.tensor([4, -1]), Need.COUNTS)
    state.record(torch.tensor([1]), torch.tensor([4]), Need.SAMPLE)
    assert state.counts.sum(-1).tolist() == [1, 0, 1, 0]
    assert state.counts[2, 4] == 1
    assert state.counts[0, 0] == 1  # -1, nothing drawn: somewhere harmless


def test_lists_grow_in_powers_of_two_and_are_cleared_for_the_next_owner() -> None:
    state = make_state()
    set_slot(state, 0, logit_bias=((7, 1.5), (9, -2.0), (11, 3.0)))
    set_slot(state, 1, logit_bias=((1, 100.0),))
    assert state.bias.ids.tolist() == [[7, 9, 11, 0], [1, 0, 0, 0], [0] * 4, [0] * 4]
    assert state.bias.values.tolist() == [[1.5, -2.0, 3.0, 0.0], [100.0, 0, 0, 0], [0.0] * 4, [0.0] * 4]
    set_slot(state, 0, logit_bias=tuple((i, 1.0) for i in range(5)))
    assert state.bias.ids[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert state.bias.ids[1].tolist() == [1] + [0] * 7
    set_slot(state, 0)
    assert state.bias.values[0].tolist() == [0.0] * 8


def test_a_list_grows_from_nothing_to_one() -> None:
    values = TokenValues(2, torch.device("cpu"))
    values.set(0, [])
    assert values.ids.shape == (2, 0)
    values.set(1, [(4, 2.0)])
    assert values.ids.tolist() == [[0], [4]]


def test_ends_are_held_back_until_min_tokens_are_there() -> None:
    state = make_state()
    set_slot(state, 0, min_tokens=3, stop_token_ids=(8,), eos=(2, 8, VOCAB + 1), output=(1, 1))
    pairs = zip(state.ends.ids[0].tolist(), state.ends.values[0].tolist(), strict=True)
    assert {pair for pair in pairs if pair[1]} == {(2, -math.inf), (8, -math.inf)}
    set_slot(state, 1, min_tokens=3, output=(1, 1, 1))
    assert state.flags([0, 1]).needs == (Need.SAMPLE | Need.MIN_TOKENS, Need.SAMPLE)


def test_token_ids_outside_the_vocabulary_have_no_logit() -> None:
    state = make_state()
    set_slot(state, 0, logit_bias=((VOCAB, 5.0), (-1, 5.0), (VOCAB - 1, 5.0)))
    assert state.bias.values.sum() == 5.0


def test_num_logprobs() -> None:
    state = make_state()
    set_slot(state, 0, logprobs=3)
    set_slot(state, 1)
    assert (state.num_logprobs(0), state.num_logprobs(1)) == (3, None)
