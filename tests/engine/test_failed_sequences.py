"""A runner that cannot compute one sequence says which: it alone is given up."""

from __future__ import annotations

import logging

import pytest

from lmserve.engine.core import STEP_FAILED, EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import SequenceFailed, StepInput
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import Results, expected_output, make_engine, run_to_end
from tests.engine.fake_runner import EOS, FakeRunner, Faults, OutOfMemoryError, make_info


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def messages(count: int) -> list[AddRequest]:
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    return [AddRequest(str(i), [(9 * i + k) % 50 for k in range(6)], sampling, [EOS]) for i in range(count)]


def lives(count: int, faults: Faults) -> tuple[Results, FakeRunner, EngineCore]:
    runner = FakeRunner(make_info(), faults)
    engine = make_engine(runner)
    for message in messages(count):
        assert engine.add_request(message) == []
    return run_to_end(engine), runner, engine


def assert_only_these_failed(results: Results, count: int, failed: set[str]) -> None:
    for message in messages(count):
        end = results.ends[(message.request_id, 0)]
        if message.request_id in failed:
            assert (end.finish_reason, end.error, end.may_retry) == (FinishReason.ERROR, STEP_FAILED, True)
        else:
            assert results.token_ids[(message.request_id, 0)] == expected_output(message, 0, 64)[0]


@pytest.mark.parametrize("place", range(4))
def test_the_others_get_their_tokens_in_the_same_step(place: int) -> None:
    results, runner, engine = lives(4, {0: ("launch", SequenceFailed(place))})
    assert_only_these_failed(results, 4, {str(place)})
    assert len(runner.steps) == 4
    assert len(runner.steps[0].chunks) == 3
    stats = engine.stats
    assert (stats.num_finished, stats.num_preemptions, stats.num_free_blocks) == (4, 0, 64)


def test_several_may_fail_one_after_the_other() -> None:
    results, runner, _ = lives(4, {attempt: ("launch", SequenceFailed(0)) for attempt in range(3)})
    assert_only_these_failed(results, 4, {"0", "1", "2"})
    assert len(runner.steps[0].chunks) == 1


def test_the_only_one_and_all() -> None:
    results, runner, _ = lives(1, {0: ("launch", SequenceFailed(0))})
    assert_only_these_failed(results, 1, {"0"})
    assert runner.steps == []


def test_out_of_memory_before_and_after() -> None:
    results, runner, engine = lives(4, {0: ("launch", OutOfMemoryError()), 1: ("launch", SequenceFailed(1))})
    assert_only_these_failed(results, 4, {"1"})
    assert engine.stats.num_preemptions == 2
    assert len(runner.steps[0].chunks) == 1
    results, _, engine = lives(5, {0: ("launch", SequenceFailed(1)), 1: ("launch", OutOfMemoryError())})
    assert_only_these_failed(results, 5, {"1"})
    assert engine.stats.num_preemptions == 2


class Confused(FakeRunner):
    """Names somebody who is not there."""

    def launch(self, step: StepInput) -> None:
        raise SequenceFailed(77)


def test_one_that_is_not_there_is_a_failed_step() -> None:
    engine = make_engine(Confused(make_info()))
    for message in messages(2):
        engine.add_request(message)
    assert [output.error for output in engine.step()] == [STEP_FAILED] * 2
    engine.check_integrity()
    assert not engine.has_work
