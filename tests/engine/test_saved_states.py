"""Saved states: the rows, and where a request takes and leaves them."""

from __future__ import annotations

import pytest

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import AddRequest, Cancel
from lmserve.engine.request import Request
from lmserve.engine.saved_states import SavedStates
from lmserve.runtime.interface import FRESH_STATE, KEPT_STATE, SequenceFailed, StateSave
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_engine, run_to_end
from tests.engine.fake_runner import FakeRunner, make_info

PROMPT = list(range(19))  # four blocks of 4, and three tokens


def test_a_row_is_found_once_it_is_filled() -> None:
    states = SavedStates(2)
    row = states.promise()
    assert row is not None
    assert states.find(b"a") is None
    states.fill(row, b"a")
    assert states.find(b"a") == row


def test_the_least_recently_used_goes_first_and_promised_rows_never() -> None:
    states = SavedStates(3)
    for name in (b"a", b"b"):
        row = states.promise()
        assert row is not None
        states.fill(row, name)
    held = states.promise()
    states.touch(b"a")
    assert states.promise() is not None  # b's
    assert (states.find(b"a") is not None, states.find(b"b")) == (True, None)
    assert states.promise() is not None
    assert states.promise() is None
    assert held is not None
    states.check_integrity({0, 1, 2})


def test_a_state_replaces_the_one_it_is_said_to() -> None:
    states = SavedStates(2)
    for name in (b"a", b"b"):
        row = states.promise()
        assert row is not None
        states.fill(row, name)
    row = states.promise(instead_of=b"b")
    assert states.find(b"a") is not None
    assert states.find(b"b") is None
    assert row is not None
    states.give_back(row)
    states.check_integrity(set())


def test_the_same_state_twice_takes_one_row() -> None:
    states = SavedStates(2)
    rows = [states.promise(), states.promise()]
    for row in rows:
        assert row is not None
        states.fill(row, b"a")
    assert states.find(b"a") == rows[0]
    states.check_integrity(set())


def test_promises_in_vain_are_noticed() -> None:
    states = SavedStates(2)
    states.promise()
    with pytest.raises(IntegrityError, match="promised in vain"):
        states.check_integrity(set())


class Turns:
    """An engine whose runner checks that each state is the one of all tokens before."""

    def __init__(self, num_saved_states: int = 8, **info: int) -> None:
        self.runner = FakeRunner(make_info(num_saved_states=num_saved_states, **info))  # type: ignore[arg-type]
        self.engine = make_engine(self.runner)
        self._count = 0

    def ask(self, prompt: list[int], *, max_tokens: int = 1, n: int = 1) -> list[int]:
        """The states that its choices began with."""
        self._count += 1
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n)
        first = len(self.runner.steps)
        self.engine.add_request(AddRequest(str(self._count), prompt, sampling))
        results = run_to_end(self.engine)
        self.output = results.token_ids[str(self._count), 0]
        return [new.state for step in self.runner.steps[first:] for new in step.new_sequences]

    @property
    def num_cached(self) -> int:
        return self.engine.stats.num_cached_tokens


def test_the_next_turn_goes_on_behind_the_last_full_block_of_the_prompt() -> None:
    turns = Turns()
    assert turns.ask(PROMPT) == [FRESH_STATE]
    assert turns.ask([*PROMPT, 5, 5, 5]) != [FRESH_STATE]
    assert turns.num_cached == 16


def test_the_next_turn_goes_on_within_the_answer() -> None:
    turns = Turns()
    turns.ask(PROMPT, max_tokens=12)
    turns.ask([*PROMPT, *turns.output, 3])
    assert turns.num_cached == 28  # the last token of the answer was never computed: 30 were


def test_a_growing_answer_keeps_one_row() -> None:
    turns = Turns(num_saved_states=2)
    turns.ask(PROMPT, max_tokens=30)
    saves = [save for step in turns.runner.steps for chunk in step.chunks for save in chunk.saves]
    assert [save.num_tokens for save in saves] == [16, 20, 24, 28, 32, 36, 40, 44, 48]
    assert len({save.row for save in saves}) == 2
    turns.ask([*PROMPT, 7])
    assert turns.num_cached == 16, "that of the prompt stays"


def test_the_third_of_those_who_begin_alike_shares_what_the_second_found() -> None:
    """Where prompts part nobody knows before the second of them comes."""
    turns = Turns()
    assert turns.ask([*PROMPT[:9], *[20] * 9]) == [FRESH_STATE]
    assert turns.ask([*PROMPT[:9], *[21] * 9]) == [FRESH_STATE]
    assert turns.ask([*PROMPT[:9], *[22] * 9]) != [FRESH_STATE]
    assert turns.num_cached == 8


def test_choices_share_their_prompt() -> None:
    turns = Turns()
    first, *others = turns.ask(PROMPT, n=3)
    assert first == FRESH_STATE
    assert FRESH_STATE not in others
    assert turns.num_cached == 32


def test_without_rows_nothing_is_shared_and_nobody_waits_for_it() -> None:
    turns = Turns(num_saved_states=0)
    assert turns.ask(PROMPT, n=3) == [FRESH_STATE] * 3
    assert turns.num_cached == 0
    assert len(turns.runner.steps[0].chunks) == 2, "two prompts of 19 tokens begin in a step of 32"


def test_what_a_failed_step_was_to_save_is_given_back() -> None:
    runner = FakeRunner(make_info(num_saved_states=1), {0: ("written", RuntimeError())})
    engine = make_engine(runner)
    engine.add_request(AddRequest("a", PROMPT, SamplingParams(max_tokens=1)))
    engine.step()
    engine.check_integrity()
    engine.add_request(AddRequest("b", PROMPT, SamplingParams(max_tokens=1)))
    run_to_end(engine)
    assert [save for step in runner.steps for chunk in step.chunks for save in chunk.saves] == [StateSave(16, 0)]


def test_those_who_are_told_again_keep_the_state_they_have() -> None:
    runner = FakeRunner(make_info(num_saved_states=4), {2: ("launch", SequenceFailed(0))})
    engine = make_engine(runner)
    for name in ("a", "b"):
        engine.add_request(AddRequest(name, PROMPT[: 8 + len(name)], SamplingParams(max_tokens=6, ignore_eos=True)))
    run_to_end(engine)
    states = [new.state for step in runner.steps[2:] for new in step.new_sequences]
    assert states == [KEPT_STATE]


def test_a_cancelled_request_gives_its_promises_back() -> None:
    runner = FakeRunner(make_info(num_saved_states=2, launches_ahead=True))
    engine = make_engine(runner)
    engine.add_request(AddRequest("a", PROMPT, SamplingParams(max_tokens=6)))
    engine.step()
    engine.cancel(Cancel("a"))
    engine.check_integrity()
    run_to_end(engine)


def test_a_whole_prompt_is_never_cut() -> None:
    info = make_info(num_saved_states=0, whole_prompts=True, max_num_batched_tokens=8)
    runner = FakeRunner(info)
    engine = make_engine(runner)
    for i in range(3):
        engine.add_request(AddRequest(str(i), PROMPT, SamplingParams(max_tokens=3, seed=i)))
    run_to_end(engine)
    lengths = [[chunk.num_tokens for chunk in step.chunks] for step in runner.steps]
    assert lengths[:3] == [[19], [1, 19], [1, 1, 19]]


def test_a_prefix_counts_up_to_its_last_state() -> None:
    kv = KVCacheManager(16, 4, num_saved_states=1)
    request = Request(
        request_id="a", choice=0, prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=1), arrival=0
    )
    assert kv.num_missing_tokens(request) == 19
