"""Both ends at once: an ``AsyncEngine`` here, the worker's loop in a thread behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from lmserve.engine import async_engine, messages
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.connection import ConnectionClosed
from lmserve.engine.messages import HEADER, AddRequest, EngineStats, MessageTooLong, StepOutputs, encode
from lmserve.errors import InvalidRequest, ModelUnloaded, QueueFull, WorkerDied
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import FatalRunnerError, RunnerInfo, StepOutput
from lmserve.sampling_params import SamplingParams
from tests.engine.engine_thread import SECONDS, EngineThread, GatedRunner
from tests.engine.factories import Results, expected_output
from tests.engine.fake_runner import EOS, FakeRunner, make_info


class SteadyRunner(FakeRunner):
    """Takes a moment for a step, as a model does: long enough for a message to come in between."""

    def __init__(self, info: RunnerInfo, seconds: float = 0.002) -> None:
        super().__init__(info)
        self._seconds = seconds

    def collect(self) -> StepOutput:
        time.sleep(self._seconds)
        return super().collect()


Play = Callable[[AsyncEngine], Awaitable[None]]


def message(name: str = "a", max_tokens: int = 12, *, n: int = 1, seed: int = 0, num_tokens: int = 10) -> AddRequest:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=seed, ignore_eos=True)
    return AddRequest(name, [i % 50 for i in range(num_tokens)], sampling, [EOS])


@contextlib.asynccontextmanager
async def connected(thread: EngineThread, max_waiting: int) -> AsyncGenerator[AsyncEngine, None]:
    """The API process's side, as ``WorkerProcess`` and the manager put it together."""
    thread.peer.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=thread.peer)
    engine = AsyncEngine(reader, writer, thread.runner.info, max_waiting=max_waiting, name="tiny")
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        if isinstance(thread.runner, GatedRunner):
            thread.runner.allow()
        engine.shut_down()
        await task


def act(play: Play, runner: FakeRunner, *, max_waiting: int = 1000) -> EngineThread:
    """Plays against a running engine, which is told to end afterwards; gives it back when it has."""

    async def all_of_it(thread: EngineThread) -> None:
        async with connected(thread, max_waiting) as engine:
            await play(engine)

    with EngineThread(runner) as thread:
        asyncio.run(asyncio.wait_for(all_of_it(thread), SECONDS))
        thread.join()
    return thread


async def collect(engine: AsyncEngine, request: AddRequest) -> Results:
    results = Results()
    async for output in engine.generate(request):
        results.take([output])
    return results


async def wait_until(condition: Callable[[], bool]) -> None:
    """The caller's time limit is the whole play's."""
    while not condition():
        await asyncio.sleep(0.001)


def assert_complete(results: Results, request: AddRequest) -> None:
    assert len(results.ends) == request.sampling.n
    for choice in range(request.sampling.n):
        key = (request.request_id, choice)
        assert (results.token_ids[key], results.ends[key].finish_reason) == expected_output(request, choice, 64)


def test_each_of_many_concurrent_requests_gets_its_own() -> None:
    requests = [message(str(i), 1 + i % 13, n=1 + i % 3, seed=i, num_tokens=1 + i) for i in range(40)]
    runner = GatedRunner(make_info())

    async def play(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
        await wait_until(lambda: engine.num_live == 40)
        runner.allow()
        for request, task in zip(requests, tasks, strict=True):
            assert_complete(await task, request)
        assert engine.num_live == 0
        assert engine.stats.num_finished == sum(request.sampling.n for request in requests)
        assert engine.stats.num_free_blocks == engine.info.num_blocks

    act(play, runner)


def test_outputs_come_as_they_are_made() -> None:
    runner = GatedRunner(make_info())

    async def play(engine: AsyncEngine) -> None:
        outputs = engine.generate(message(max_tokens=3))
        for num_steps in range(1, 4):
            runner.allow(1)
            output = await anext(outputs)
            assert len(output.token_ids) == 1
            assert (engine.stats.num_steps, engine.num_live) == (num_steps, 1)
        assert output.finish_reason is FinishReason.LENGTH
        assert [rest async for rest in outputs] == []
        assert engine.num_live == 0

    act(play, runner)


def test_closing_the_generator_frees_the_blocks() -> None:
    runner = GatedRunner(make_info())

    async def play(engine: AsyncEngine) -> None:
        runner.allow(1)
        outputs = engine.generate(message(max_tokens=50, n=3))
        await anext(outputs)
        assert engine.stats.num_free_blocks < 64
        await outputs.aclose()
        assert engine.num_live == 0
        runner.allow(1)  # the step that was in flight
        await wait_until(lambda: engine.stats.num_cancelled == 3)
        assert engine.stats.num_free_blocks == 64
        assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 0)

    assert act(play, runner).core.has_work is False
    assert len(runner.steps) <= 2


def test_cancelling_the_task_that_listens_cancels_the_request() -> None:
    runner = GatedRunner(make_info())

    async def play(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, message()))
        await asyncio.to_thread(runner.wait_launched)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(engine.wait_idle(), SECONDS)
        runner.allow(1)
        await wait_until(lambda: engine.stats.num_cancelled == 1)

    act(play, runner)


def test_a_cancelled_choice_says_so_and_the_others_go_on() -> None:
    runner = GatedRunner(make_info())
    request = message(n=3)

    async def play(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, request))
        await asyncio.to_thread(runner.wait_launched)
        engine.cancel("a", 1)
        engine.cancel("unknown")
        runner.allow()
        results = await task
        reasons = {choice: results.ends[("a", choice)].finish_reason for choice in range(3)}
        assert reasons == {0: FinishReason.LENGTH, 1: FinishReason.ABORT, 2: FinishReason.LENGTH}
        for choice in (0, 2):
            assert results.token_ids[("a", choice)] == expected_output(request, choice, 64)[0]

    act(play, runner)


def test_a_full_queue_refuses_until_somebody_ends() -> None:
    runner = GatedRunner(make_info(max_num_seqs=2))

    async def play(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, message(str(i), 2, n=2))) for i in range(2)]
        tasks.append(asyncio.create_task(collect(engine, message("2", 2))))
        await wait_until(lambda: engine.num_live == 3)
        for _ in range(2):
            with pytest.raises(QueueFull, match="3 sequences wait, the limit is 3"):
                await anext(engine.generate(message("one too many")))
        assert engine.num_live == 3, "who was refused leaves no trace"
        runner.allow()
        for i, task in enumerate(tasks):
            assert_complete(await task, message(str(i), 2, n=2 if i < 2 else 1))
        for name in ("3", "4"):
            assert_complete(await collect(engine, message(name, n=5)), message(name, n=5))

    act(play, runner, max_waiting=3)


def test_a_request_too_large_for_a_message_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 2_000)

    async def play(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequest, match="too large"):
            await anext(engine.generate(message(num_tokens=3_000)))
        assert engine.num_live == 0
        assert_complete(await collect(engine, message()), message())

    act(play, FakeRunner(make_info()))


def test_what_the_engine_refuses_ends_with_an_error() -> None:
    async def play(engine: AsyncEngine) -> None:
        results = await collect(engine, message(n=2, num_tokens=64))
        assert {end.finish_reason for end in results.ends.values()} == {FinishReason.ERROR}
        assert len(results.ends) == 2

    act(play, FakeRunner(make_info()))


def test_when_the_worker_dies_every_live_request_hears_it_once() -> None:
    runner = GatedRunner(make_info(max_num_seqs=2), {3: ("collect", FatalRunnerError("device"))})
    requests = [message("done", 2), message("running", 50), message("waiting", 50), message("n", n=3)]

    async def play(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, request)) for request in requests]
        await wait_until(lambda: engine.num_live == 4)
        runner.allow()
        heard = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(heard[0], Results)
        assert_complete(heard[0], requests[0])
        assert [type(each) for each in heard[1:]] == [WorkerDied] * 3
        assert "tiny ended while the request ran" in str(heard[1])
        await asyncio.wait_for(engine.wait_idle(), SECONDS)
        assert engine.num_live == 0
        with pytest.raises(WorkerDied, match="started again"):
            await anext(engine.generate(message("late")))
        engine.cancel("running")
        engine.shut_down()

    assert isinstance(act(play, runner).join(), FatalRunnerError)


def test_shutting_down_ends_the_worker_and_what_still_runs() -> None:
    runner = GatedRunner(make_info())

    async def play(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, message()))
        await asyncio.to_thread(runner.wait_launched)
        engine.shut_down(ModelUnloaded("It was unloaded."))
        runner.allow()
        with pytest.raises(ModelUnloaded, match="It was unloaded"):
            await task
        with pytest.raises(ModelUnloaded):
            await collect(engine, message("late"))

    end = act(play, runner).join()
    assert end is None or isinstance(end, ConnectionClosed), "either way the worker ends"


def test_shutting_down_without_a_reason_is_a_workers_end() -> None:
    async def play(engine: AsyncEngine) -> None:
        engine.shut_down()
        engine.shut_down()
        with pytest.raises(WorkerDied):
            await collect(engine, message())

    act(play, FakeRunner(make_info()))


@contextlib.asynccontextmanager
async def asking() -> AsyncGenerator[tuple[socket.socket, AsyncEngine, asyncio.Task[Results]], None]:
    """A worker's socket that the test speaks through, an engine without its ``run``, a request that has been sent."""
    ours, theirs = socket.socketpair()
    with theirs:
        reader, writer = await asyncio.open_connection(sock=ours)
        engine = AsyncEngine(reader, writer, make_info(), max_waiting=1, name="tiny")
        task = asyncio.create_task(collect(engine, message()))
        await wait_until(lambda: engine.num_live == 1)
        assert theirs.recv(10_000) == encode(message())
        yield theirs, engine, task
        writer.close()
        await writer.wait_closed()


def test_a_request_that_has_ended_is_not_cancelled() -> None:
    async def play() -> None:
        async with asking() as (worker, engine, task):
            running = asyncio.create_task(engine.run())
            last = RequestOutput("a", 0, (1,), finish_reason=FinishReason.STOP)
            worker.sendall(encode(StepOutputs([last], EngineStats())))
            assert (await task).ends == {("a", 0): last}
            worker.setblocking(False)
            with pytest.raises(BlockingIOError):
                worker.recv(1)
            worker.close()
            await running

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_a_frame_over_the_limit_ends_the_connection() -> None:
    async def play() -> None:
        async with asking() as (worker, engine, task):
            worker.sendall(HEADER.pack(2**31))
            with pytest.raises(MessageTooLong):
                await engine.run()
            with pytest.raises(WorkerDied):
                await task

    asyncio.run(asyncio.wait_for(play(), SECONDS))


def test_before_the_first_step_all_blocks_are_free() -> None:
    async def play(engine: AsyncEngine) -> None:
        assert engine.stats == EngineStats(num_free_blocks=64)
        assert engine.num_live == 0
        await engine.wait_idle()

    act(play, FakeRunner(make_info()))


def test_a_slow_reader_pauses_its_own_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unread stays bounded, the worker sleeps, and nothing is lost."""
    monkeypatch.setattr(async_engine, "MAX_UNREAD_TOKENS", 8)
    info = make_info(num_blocks=400, max_model_len=600)
    slow, quick = message("slow", 200), message("quick", 300)

    async def play(engine: AsyncEngine) -> None:
        outputs = engine.generate(slow)
        results = Results()
        results.take([await anext(outputs)])
        await wait_until(lambda: engine.stats.num_paused == 1 or engine.stats.num_running == 0)
        results_quick = await collect(engine, quick)
        tokens, reason = expected_output(quick, 0, 600)
        assert (results_quick.token_ids["quick", 0], results_quick.ends["quick", 0].finish_reason) == (tokens, reason)
        assert engine.stats.num_paused == 1
        done = engine.stats.num_generated_tokens - 300
        assert done < 200 - 100, "it went on although nobody read"
        async for output in outputs:
            results.take([output])
        tokens, reason = expected_output(slow, 0, 600)
        assert (results.token_ids["slow", 0], results.ends["slow", 0].finish_reason) == (tokens, reason)
        await engine.wait_idle()

    thread = act(play, SteadyRunner(info))
    assert thread.core.stats.num_free_blocks == 400


def test_a_paused_request_hears_of_the_workers_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD_TOKENS", 4)

    async def play(engine: AsyncEngine) -> None:
        outputs = engine.generate(message("slow", 40))
        await anext(outputs)
        await wait_until(lambda: engine.num_live == 1 and engine.stats.num_generated_tokens > 4)
        engine.shut_down()
        with pytest.raises(WorkerDied):
            async for _ in outputs:
                pass

    act(play, SteadyRunner(make_info()))


def test_a_paused_request_whose_reader_leaves_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "MAX_UNREAD_TOKENS", 4)

    async def play(engine: AsyncEngine) -> None:
        outputs = engine.generate(message("slow", 40))
        await anext(outputs)
        await wait_until(lambda: engine.stats.num_generated_tokens > 4)
        await outputs.aclose()
        await collect(engine, message("next"))
        await wait_until(lambda: engine.stats.num_cancelled == 1)
        assert engine.stats.num_paused == 0

    thread = act(play, SteadyRunner(make_info()))
    assert thread.core.stats.num_free_blocks == 64
