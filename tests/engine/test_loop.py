from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.connection import ConnectionClosed, WorkerConnection
from lmserve.engine.loop import run_engine
from lmserve.engine.messages import AddRequest, Cancel, Load, Shutdown, StepOutputs, encode
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import FatalRunnerError
from lmserve.sampling_params import SamplingParams
from tests.engine.engine_thread import EngineThread, GatedRunner
from tests.engine.factories import Results, expected_output, make_engine
from tests.engine.fake_runner import EOS, FakeRunner, make_info


def message(name: str = "a", max_tokens: int = 6, *, num_tokens: int = 10, first_token: int = 0) -> AddRequest:
    prompt = [(first_token + i) % 50 for i in range(num_tokens)]
    return AddRequest(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), [EOS])


def news(outputs: StepOutputs) -> list[tuple[str, str | None]]:
    """Who is heard of, and who ended how."""
    return [(o.request_id, o.finish_reason and o.finish_reason.value) for o in outputs.outputs]


def test_one_message_a_step_with_the_news_of_all() -> None:
    sent = [message("a", 4), message("b", 6, first_token=20)]
    with EngineThread(FakeRunner(make_info())) as engine:
        engine.send(*sent)
        results, received = Results(), []
        while len(results.ends) < 2:
            received.append(engine.receive())
            results.take(received[-1].outputs)
        assert [m.stats.num_steps for m in received] == list(range(1, len(received) + 1))
        for each in sent:
            assert results.token_ids[(each.request_id, 0)] == expected_output(each, 0, 64)[0]
        assert received[-1].stats == engine.core.stats
        assert received[-1].stats.num_free_blocks == 64


def test_idle_time_is_used_until_there_is_nothing_to_do_or_something_comes() -> None:
    runner = FakeRunner(make_info())
    runner.idle_times = 5
    with EngineThread(runner) as engine:
        engine.send(message(max_tokens=1))
        engine.receive()
        _wait_for(lambda: runner.num_idle_times >= 5)
        time.sleep(0.1)
        _wait_for(lambda: runner.num_idle_times in (5, 10))  # before the request and after it; not again while it waits
        runner.idle_times = 10**9
        engine.send(message("b", max_tokens=1))
        engine.receive()
        busy = runner.num_idle_times
        _wait_for(lambda: runner.num_idle_times > busy + 100)
        engine.send(message("c", max_tokens=1))
        assert news(engine.receive()) == [("c", "length")]


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_step_without_news_tells_the_counters_alone() -> None:
    with EngineThread(FakeRunner(make_info(max_num_batched_tokens=4))) as engine:
        engine.send(message(num_tokens=10, max_tokens=1))
        told = [engine.receive() for _ in range(3)]
    assert [(message.stats.num_prompt_tokens, len(message.outputs)) for message in told] == [(4, 0), (8, 0), (10, 1)]


def test_what_comes_during_a_step_is_taken_up_before_the_next() -> None:
    runner = GatedRunner(make_info())
    with EngineThread(runner) as engine:
        engine.send(message("a"))
        runner.wait_launched()
        engine.send(Cancel("a"), message("b", 2, first_token=20), message("c", 2, first_token=30))
        runner.allow(1)
        assert news(engine.receive()) == [("a", None)]
        step = runner.wait_launched()
        assert [len(new.token_ids) for new in step.new_sequences] == [10, 10]
        assert len(step.chunks) == 2, "the cancelled one is in no further step"
        runner.allow(1)
        outputs = engine.receive()
        assert news(outputs) == [("a", "abort"), ("b", None), ("c", None)], "one message for cancel and step"
        assert outputs.stats.num_cancelled == 1


def test_cancelling_the_last_one_is_said_without_a_step() -> None:
    runner = GatedRunner(make_info())
    with EngineThread(runner) as engine:
        engine.send(message())
        runner.wait_launched()
        engine.send(Cancel("a"))
        runner.allow(1)
        engine.receive()
        outputs = engine.receive()
        assert news(outputs) == [("a", "abort")]
        assert (outputs.stats.num_free_blocks, outputs.stats.num_steps) == (64, 1)


def test_a_refusal_is_said_at_once() -> None:
    with EngineThread(FakeRunner(make_info())) as engine:
        engine.send(message("too long", num_tokens=64))
        [output] = engine.receive().outputs
        assert (output.request_id, output.finish_reason) == ("too long", FinishReason.ERROR)


def test_a_cancel_of_nobody_is_not_answered() -> None:
    with EngineThread(FakeRunner(make_info())) as engine:
        engine.send(Cancel("nobody"))
        engine.send(message(max_tokens=1))
        assert news(engine.receive()) == [("a", "length")]


def test_idle_it_waits_on_the_socket() -> None:
    with EngineThread(FakeRunner(make_info())) as engine:
        engine.wait_idle()
        engine.socket.blocking_read.clear()
        engine.send(message(max_tokens=1))
        engine.receive()
        engine.wait_idle()
        num_reads = engine.socket.num_reads
        time.sleep(0.05)
        assert engine.socket.num_reads == num_reads


def test_idle_it_checks_its_books() -> None:
    with EngineThread(FakeRunner(make_info())) as engine:
        engine.wait_idle()
        engine.core.scheduler._free_slots.pop()
        engine.send(Cancel("nobody"))
        assert isinstance(engine.join(), IntegrityError)


@pytest.mark.parametrize("busy", [False, True])
def test_shutdown_ends_it(busy: bool) -> None:
    runner = GatedRunner(make_info())
    with EngineThread(runner) as engine:
        if busy:
            engine.send(message())
            runner.wait_launched()
        engine.send(Shutdown(), message("not heard", first_token=20))
        runner.allow()
        assert engine.join() is None
        assert runner.num_attempts == int(busy)


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_when_the_other_side_is_gone(busy: bool) -> None:
    runner = GatedRunner(make_info())
    with EngineThread(runner) as engine:
        if busy:
            engine.send(message())
            runner.wait_launched()
        engine.peer.close()
        runner.allow()
        assert isinstance(engine.join(), ConnectionClosed)
        assert runner.num_attempts == int(busy)


def test_a_device_that_cannot_be_trusted_ends_it() -> None:
    with EngineThread(FakeRunner(make_info(), {1: ("collect", FatalRunnerError("device"))})) as engine:
        engine.send(message())
        assert news(engine.receive()) == [("a", None)]
        assert isinstance(engine.join(), FatalRunnerError)
        assert engine.peer.recv(1) == b"", "nothing more is said"


def test_a_failed_step_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    with EngineThread(FakeRunner(make_info(), {0: ("launch", RuntimeError("broken"))})) as engine:
        engine.send(message())
        assert news(engine.receive()) == [("a", "error")]
        engine.send(message("again", max_tokens=1))
        assert news(engine.receive()) == [("again", "length")]
    assert "broken" in caplog.text


def test_a_message_that_has_no_place_ends_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(Load({})))
        with pytest.raises(AssertionError, match="Load has no place"):
            run_engine(make_engine(FakeRunner(make_info())), WorkerConnection(theirs))
