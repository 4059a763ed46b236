from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.engine.encoder_queue import MAX_INPUTS_A_STEP, EncoderQueue, Pick
from lmserve.runtime.interface import EncoderInput

BUDGET = 64
LONGEST = 100


def inputs(*lengths: int) -> list[EncoderInput]:
    return [EncoderInput([7] * length) for length in lengths]


def num_tokens(picks: list[Pick]) -> int:
    return sum(len(request.inputs[index].token_ids) for request, index in picks)


def names(picks: list[Pick]) -> list[tuple[str, int]]:
    return [(request.request_id, index) for request, index in picks]


def test_longest_first() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(3, 30, 20, 40, 1))
    assert names(queue.pick(BUDGET)) == [("a", 3)], "30 more do not fit"
    assert names(queue.pick(BUDGET)) == [("a", 1), ("a", 2), ("a", 0), ("a", 4)]
    assert queue.pick(BUDGET) == []
    assert queue.num_waiting == 0


def test_an_input_over_the_budget_goes_alone() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(1, 500))
    assert names(queue.pick(BUDGET)) == [("a", 1)]
    assert names(queue.pick(BUDGET)) == [("a", 0)]


def test_a_step_has_so_many_inputs_at_most() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(*[1] * (MAX_INPUTS_A_STEP + 1)))
    assert [len(queue.pick(1 << 20)) for _ in range(2)] == [MAX_INPUTS_A_STEP, 1]


def test_one_text_beside_a_thousand_is_in_the_next_step() -> None:
    queue = EncoderQueue()
    queue.add("large", inputs(*[16] * 1000))
    for _ in range(5):
        assert len(queue.pick(BUDGET)) == 4
    queue.add("small", inputs(10))
    assert ("small", 0) in names(queue.pick(BUDGET))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, LONGEST), min_size=30, max_size=60),
    st.integers(1, 20),
    st.integers(1, BUDGET),
)
def test_who_comes_while_another_runs_is_in_the_next_step(large: list[int], steps: int, small: int) -> None:
    queue = EncoderQueue()
    queue.add("large", inputs(*large))
    for _ in range(steps):
        queue.pick(BUDGET)
    queue.add("small", inputs(small))
    assert ("small", 0) in names(queue.pick(BUDGET))


@pytest.mark.parametrize("length", [1, 8, 64])
def test_a_stream_of_newcomers_keeps_nobody_out(length: int) -> None:
    """They fill every step by themselves."""
    queue = EncoderQueue()
    queue.add("large", inputs(*[16] * 1000))
    at = []
    for step in range(300):
        for number in range(BUDGET // length):
            queue.add(f"{step}-{number}", inputs(length))
        at += [step for name, _ in names(queue.pick(BUDGET)) if name == "large"]
    assert len(at) > 10, "as often as so many requests leave it"
    assert max(later - earlier for earlier, later in zip(at, at[1:], strict=False)) < 100


def test_what_fits_beside_the_others_costs_nobody_later() -> None:
    """Two of 33 tokens are too much for a step, one of 31 more is not: "c" is in each step, and the others in turn."""
    queue = EncoderQueue()
    for name, length in (("a", 33), ("b", 33), ("c", 31)):
        queue.add(name, inputs(*[length] * 1000))
    for _ in range(400):
        assert "c" in {name for name, _ in names(queue.pick(BUDGET))}
    queue.add("d", inputs(*[16] * 1000))  # beside which c does not fit any more
    picks = [{name for name, _ in names(queue.pick(BUDGET))} for _ in range(40)]
    assert "d" in set().union(*picks[:10]), "it does not wait until a and b have made up for 400 steps"
    for name in "abcd":
        assert sum(name in each for each in picks) >= 5, "nor does anybody wait for it"


def test_requests_share_the_steps_by_tokens() -> None:
    queue = EncoderQueue()
    queue.add("long", inputs(*[32] * 50))
    queue.add("short", inputs(*[4] * 400))
    given = {"long": 0, "short": 0}
    for _ in range(20):
        for request, index in queue.pick(BUDGET):
            given[request.request_id] += len(request.inputs[index].token_ids)
    assert abs(given["long"] - given["short"]) <= BUDGET


def test_who_comes_late_does_not_catch_up_alone() -> None:
    queue = EncoderQueue()
    queue.add("first", inputs(*[8] * 1000))
    for _ in range(50):
        queue.pick(BUDGET)
    queue.add("late", inputs(*[8] * 1000))
    picks = [name for _ in range(10) for name, _ in names(queue.pick(BUDGET))]
    assert 30 <= picks.count("first") <= 50


def test_a_removed_request_waits_no_more() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(40, 40))
    queue.add("b", inputs(40))
    queue.pick(BUDGET)
    assert queue.remove("a")
    assert not queue.remove("a")
    assert queue.num_waiting == len(queue.live["b"].waiting)
    assert {name for name, _ in names(queue.pick(BUDGET))} <= {"b"}


def test_what_is_put_back_goes_first() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(30, 20, 10))
    queue.add("b", inputs(4))
    first = queue.pick(BUDGET)
    before = queue.num_waiting
    queue.put_back(first[1:])
    assert queue.num_waiting == before + len(first) - 1
    assert names(queue.pick(BUDGET))[: len(first) - 1] == names(first[1:])


def test_what_is_put_back_was_not_given() -> None:
    queue = EncoderQueue()
    queue.add("a", inputs(30, 20, 10))
    queue.add("b", inputs(4, 2))
    given = {name: request.num_tokens_given for name, request in queue.live.items()}
    picks = queue.pick(BUDGET)
    queue.put_back(picks)
    assert {name: request.num_tokens_given for name, request in queue.live.items()} == given
    assert queue.num_waiting == 5
    assert sorted(names(queue.pick(1000))) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(1, LONGEST), min_size=1, max_size=12),  # a request, by the lengths of its inputs
            st.none(),  # a step
            st.integers(0, 20),  # a cancel
        ),
        max_size=30,
    ),
    st.integers(1, 120),
)
def test_every_input_is_picked_once(events: list[list[int] | int | None], budget: int) -> None:
    queue, picked, removed = EncoderQueue(), list[tuple[str, int]](), set[str]()
    added: dict[str, int] = {}

    def step() -> None:
        picks = queue.pick(budget)
        assert picks or not queue.num_waiting
        assert len(picks) == 1 or num_tokens(picks) <= budget
        picked.extend(names(picks))
        given = [request.num_tokens_given for request in queue.live.values() if request.waiting]
        assert max(given, default=0) - min(given, default=0) <= 2 * (LONGEST + budget), "nobody falls behind by more"

    for event in events:
        if event is None:
            step()
        elif isinstance(event, int):
            name = str(event)
            if queue.remove(name):
                removed.add(name)
        else:
            name = str(len(added))
            added[name] = len(event)
            queue.add(name, inputs(*event))
    while queue.num_waiting:
        step()
    assert len(set(picked)) == len(picked)
    assert {pick for pick in picked if pick[0] not in removed} == {
        (name, i) for name, count in added.items() if name not in removed for i in range(count)
    }
