"""What is drawn without knowing on the host what rows ask for is what a call draws, bit by bit, captured or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmserve.runtime.sampler import DrawKind, Sampler
from lmserve.runtime.sampling_state import Need, SamplingState
from tests.runtime.recorded_graph import RecordedGraphs
from tests.runtime.sampler_rows import MIXED, VOCAB, give_slot, make_logits, make_sampler, sample

HOT: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1e-5},
    {"top_p": 0.9},
    {"temperature": 0, "logprobs": 3},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 300, "temperature": 1.4},
    {"min_p": 0.05, "top_p": 0.4},
    {"min_p": 0.1, "top_k": 70},
]
GREEDY, PLAIN, CUT = HOT[:1] * 3, HOT[:3], [HOT[0], HOT[5], HOT[6], HOT[9]]


def draw(sampler: Sampler, state: SamplingState, logits: Tensor, position: int) -> list[int]:
    slots = list(range(len(logits)))
    kind = sampler.kind(state.flags(slots))
    assert kind is not None
    return sampler.draw(logits, torch.tensor(slots), torch.full((len(slots),), position), kind).tolist()


@pytest.mark.parametrize("rows", [GREEDY, PLAIN, CUT, HOT], ids=["greedy", "plain", "cut", "all"])
def test_it_is_what_a_call_gives(rows: list[dict[str, Any]]) -> None:
    for position in range(40):
        logits = make_logits(len(rows), position).bfloat16()
        sampler, state = make_sampler(rows)
        expected = sample(sampler, state, logits, positions=position).token_ids.tolist()
        noted = state.last_tokens.tolist()
        sampler, state = make_sampler(rows)
        assert draw(sampler, state, logits, position) == expected
        assert state.last_tokens.tolist() == noted


def test_the_size_of_a_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, results = make_logits(len(HOT), 1), []
    for rows in (1, 3, 100):
        monkeypatch.setattr("lmserve.runtime.sampler._CHUNK_ELEMENTS_CPU", rows << 15)
        results.append(draw(*make_sampler(HOT), logits, 7))
    assert results[0] == results[1] == results[2]


def test_rows_that_cannot_be_drawn_from_say_so_and_spoil_no_other() -> None:
    logits = make_logits(len(HOT), 2)
    expected = draw(*make_sampler(HOT), logits, 7)
    logits[0], logits[3, 5] = float("nan"), float("nan")
    assert draw(*make_sampler(HOT), logits, 7) == [-1, *expected[1:3], -1, *expected[4:]]


@pytest.mark.parametrize("row", [row for row in MIXED if row not in HOT], ids=str)
def test_the_kind_says_which_rows_a_call_has_to_draw(row: dict[str, Any]) -> None:
    sampler, state = make_sampler([row])
    needs = state.flags([0]).union
    slow = Need.MIN_TOKENS | Need.GRAMMAR | Need.BIAS | Need.COUNTS | Need.SEEN | Need.TYPICAL_P
    assert (sampler.kind(state.flags([0])) is None) == bool(needs & slow)


def test_there_are_few_kinds() -> None:
    rows: list[dict[str, Any]] = [{"top_k": k} for k in (1, 5, 63, 64, 65, 600, 996)]
    sampler, state = make_sampler(rows)
    kinds = [sampler.kind(state.flags([slot])) for slot in range(len(rows))]
    assert [kind and kind.max_top_k for kind in kinds] == [64, 64, 64, 64, 128, VOCAB, VOCAB]
    sampler, state = make_sampler([{"temperature": 0, "logprobs": 2}])
    assert sampler.kind(state.flags([0])) == DrawKind() == sampler.kind(state.flags([]))


@pytest.mark.parametrize("wanted", [GREEDY, PLAIN, CUT, HOT], ids=["greedy", "plain", "cut", "all"])
def test_captured_it_follows_what_the_slots_ask_for(wanted: list[dict[str, Any]]) -> None:
    """Other logits, slots, positions and owners than those it was captured with; rows of padding behind."""
    size = len(HOT)
    sampler, state = make_sampler(HOT)
    kind = sampler.kind(state.flags(range(size)))
    assert kind is not None
    logits, slots = torch.zeros(size, VOCAB), torch.full((size,), state.num_slots)
    positions, token_ids = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    graph = RecordedGraphs().capture(lambda: token_ids.copy_(sampler.draw(logits, slots, positions, kind)))
    for slot, row in enumerate(reversed(wanted)):
        give_slot(state, slot, seed=100 + slot, **row)
    used = list(range(len(wanted)))
    for step in range(3):
        logits.copy_(make_logits(size, step))
        slots.fill_(state.num_slots)
        slots[: len(used)] = torch.tensor(used)
        positions.fill_(20 + step)
        graph.replay()
        drawn = token_ids[: len(used)].tolist()
        assert state.last_tokens[used].tolist() == drawn
        assert drawn == sample(sampler, state, logits[: len(used)], used, 20 + step).token_ids.tolist()
        used = used[1:]
