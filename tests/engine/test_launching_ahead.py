"""Steps that are launched before the last one is collected. ``test_properties.py`` lives whole lives so, too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from lmserve.engine.messages import AddRequest, Cancel, Pause, Resume
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import RunnerInfo, SequenceFailed, StepInput, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import Results, expected_output, make_engine, run_to_end
from tests.engine.fake_runner import EOS, VOCAB_SIZE, FakeRunner, Faults, OutOfMemoryError, make_info

LIMIT = 64


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def message(name: str, num_tokens: int = 6, **sampling: Any) -> AddRequest:
    prompt = [(len(name) * 11 + ord(name[0]) + i) % VOCAB_SIZE for i in range(num_tokens)]
    return AddRequest(name, prompt, SamplingParams(**{"max_tokens": 12, **sampling}), [EOS])


class DelayedRunner(FakeRunner):
    """A device with a clock: a launch takes the host ``host`` seconds, the step the device ``device`` seconds more."""

    def __init__(self, info: RunnerInfo, *, host: float, device: float) -> None:
        super().__init__(info)
        self.now = 0.0
        self.idle = 0.0
        """Seconds in which the device had nothing to do, since its first step."""
        self._host, self._device = host, device
        self._ends: list[float] = []
        self._busy_until: float | None = None

    def launch(self, step: StepInput) -> None:
        self.now += self._host
        super().launch(step)
        begins = self.now if self._busy_until is None else max(self.now, self._busy_until)
        self.idle += 0.0 if self._busy_until is None else begins - self._busy_until
        self._busy_until = begins + self._device
        self._ends.append(self._busy_until)

    def collect(self) -> StepOutput:
        self.now = max(self.now, self._ends.pop(0))
        return super().collect()


def run_delayed(*, ahead: bool, host: float, device: float) -> DelayedRunner:
    runner = DelayedRunner(make_info(launches_ahead=ahead), host=host, device=device)
    engine = make_engine(runner, clock=lambda: runner.now)
    sent = [message(name, ignore_eos=True, max_tokens=40) for name in "abc"]
    for each in sent:
        engine.add_request(each)
    results = run_to_end(engine)
    for each in sent:
        assert results.token_ids[each.request_id, 0] == expected_output(each, 0, LIMIT)[0]
    return runner


def test_the_device_never_waits_for_the_host() -> None:
    ahead, in_turn = (run_delayed(ahead=ahead, host=2.0, device=5.0) for ahead in (True, False))
    assert len(ahead.steps) == len(in_turn.steps) == 40
    assert ahead.idle == 0
    assert in_turn.idle == 2.0 * 39
    assert (ahead.now, in_turn.now) == (2.0 + 40 * 5.0, 40 * 7.0)


def test_a_slow_host_sets_the_pace_alone() -> None:
    runner = run_delayed(ahead=True, host=5.0, device=2.0)
    assert runner.now == 40 * 5.0 + 2.0


def test_what_steps_take_is_learnt_from_the_device() -> None:
    runner = DelayedRunner(make_info(launches_ahead=True), host=2.0, device=5.0)
    engine = make_engine(runner, clock=lambda: runner.now)
    engine.add_request(message("a", ignore_eos=True, max_tokens=40))
    run_to_end(engine)
    assert engine.scheduler.pace.costs.decode_seconds(1) == pytest.approx(5.0)


def test_one_that_ends_by_its_length_is_not_computed_in_vain() -> None:
    for sent in (message("a", ignore_eos=True, max_tokens=9), message("a", 60, ignore_eos=True, max_tokens=50)):
        runner = FakeRunner(make_info(launches_ahead=True))
        engine = make_engine(runner)
        engine.add_request(sent)
        results = run_to_end(engine)
        tokens, _ = expected_output(sent, 0, LIMIT)
        assert results.token_ids["a", 0] == tokens
        num_prompt = len(sent.prompt_token_ids)
        assert sum(step.num_tokens for step in runner.steps) == num_prompt + len(tokens) - 1


def test_one_that_ends_by_a_token_is_computed_once_in_vain() -> None:
    tokens, _ = expected_output(message("a", ignore_eos=True), 0, LIMIT)
    sent = message("a", stop_token_ids=(tokens[4],), ignore_eos=True)
    num_wanted = tokens.index(tokens[4]) + 1
    runner = FakeRunner(make_info(launches_ahead=True))
    engine = make_engine(runner)
    engine.add_request(sent)
    results = run_to_end(engine)
    assert results.token_ids["a", 0] == tokens[:num_wanted]
    assert results.ends["a", 0].finish_reason is FinishReason.STOP
    assert sum(step.num_tokens for step in runner.steps) == 6 + num_wanted
    assert engine.stats.num_generated_tokens == num_wanted


def test_news_come_one_step_later_and_all_of_them() -> None:
    engine = make_engine(FakeRunner(make_info(launches_ahead=True)))
    engine.add_request(message("a", max_tokens=1))
    assert engine.step() == []
    assert engine.has_work
    [output] = engine.step()
    assert output.finish_reason is FinishReason.LENGTH
    assert not engine.has_work


def test_a_cancel_frees_at_once_and_what_is_on_its_way_is_dropped() -> None:
    engine = make_engine(FakeRunner(make_info(launches_ahead=True)))
    engine.add_request(message("a", ignore_eos=True, max_tokens=40))
    for _ in range(5):
        engine.step()
    [output] = engine.cancel(Cancel("a"))
    assert output.finish_reason is FinishReason.ABORT
    assert engine.stats.num_free_blocks == 64
    after = message("b")
    engine.add_request(after)  # in the same slot, over the same blocks, behind the step that is on its way
    results = run_to_end(engine)
    assert results.token_ids["b", 0] == expected_output(after, 0, LIMIT)[0]
    assert ("a", 0) not in results.token_ids


def test_one_that_is_paused_with_a_step_on_its_way_gets_its_token_and_starts_behind_it() -> None:
    engine = make_engine(FakeRunner(make_info(launches_ahead=True)))
    sent = message("a", ignore_eos=True, max_tokens=20)
    engine.add_request(sent)
    results = Results()
    for _ in range(4):
        results.take(engine.step())
    engine.pause(Pause("a"))
    engine.resume(Resume("a"))
    while engine.has_work:
        results.take(engine.step())
        engine.check_integrity()
    assert results.token_ids["a", 0] == expected_output(sent, 0, LIMIT)[0]


OOM = OutOfMemoryError()


@pytest.mark.parametrize(
    ("faults", "num_lost"),
    [
        ({3: ("launch", OOM)}, 0),
        ({3: ("launch", OOM), 4: ("launch", OOM)}, 2),
        ({3: ("launch", RuntimeError())}, 4),
        ({3: ("launch", SequenceFailed(1))}, 1),
        ({3: ("collect", RuntimeError())}, 4),
        ({3: ("written", OOM)}, 0),
    ],
    ids=["out of memory", "twice", "another error", "one sequence", "seen too late", "after its work"],
)
def test_a_failure_costs_its_own_step_and_no_token_that_was_on_its_way(faults: Faults, num_lost: int) -> None:
    engine = make_engine(FakeRunner(make_info(launches_ahead=True), faults))
    sent = [message(name, ignore_eos=True, max_tokens=20) for name in "abcd"]
    for each in sent:
        engine.add_request(each)
    results = run_to_end(engine)
    ends = [results.ends[each.request_id, 0].finish_reason for each in sent]
    assert ends.count(FinishReason.ERROR) == num_lost
    for each, end in zip(sent, ends, strict=True):
        tokens, _ = expected_output(each, 0, LIMIT)
        got = results.token_ids[each.request_id, 0]
        if end is FinishReason.ERROR:
            assert got == tokens[: len(got)]
            assert len(got) == 3, "what was launched before has come"
        else:
            assert got == tokens
    assert engine.stats.num_free_blocks == 64
