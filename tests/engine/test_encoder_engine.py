"""Both ends at once: an ``AsyncEngine`` here, the worker's loop around an encoder in a thread behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest

from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.connection import ConnectionClosed, WorkerConnection
from lmserve.engine.encoder_core import EncoderCore
from lmserve.engine.loop import run_engine
from lmserve.engine.messages import Encode
from lmserve.errors import ModelUnloaded, QueueFull, WorkerDied
from lmserve.outputs import EncoderOutput
from lmserve.runtime.interface import EncoderInput, FatalRunnerError
from tests.engine.engine_thread import SECONDS
from tests.engine.fake_encoder import ROW_SIZE, FakeEncoder, row

Play = Callable[[AsyncEngine], Awaitable[None]]


class GatedEncoder(FakeEncoder):
    """Holds each step back until it is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)
        self.entered = threading.Event()

    def allow(self, num_steps: int = 1_000_000) -> None:
        self._permits.release(num_steps)

    def encode(self, inputs: list[EncoderInput]) -> list[bytes]:
        self.entered.set()
        assert self._permits.acquire(timeout=SECONDS)
        return super().encode(inputs)


def message(name: str, *lengths: int) -> Encode:
    return Encode(name, [EncoderInput([1 + i % 90] * length) for i, length in enumerate(lengths)])


def act(play: Play, runner: GatedEncoder, max_waiting: int = 100) -> EncoderCore:
    """Plays against a running engine, which is told to end afterwards."""
    core = EncoderCore(runner)
    ours, theirs = socket.socketpair()

    def work() -> None:
        with theirs, contextlib.suppress(ConnectionClosed, FatalRunnerError):
            run_engine(core, WorkerConnection(theirs))

    async def all_of_it() -> None:
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        engine = AsyncEngine(reader, writer, runner.info, max_waiting=max_waiting, name="tiny")
        running = asyncio.create_task(engine.run())
        try:
            await play(engine)
        finally:
            runner.allow()
            engine.shut_down()
            await running

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    asyncio.run(asyncio.wait_for(all_of_it(), SECONDS))
    thread.join(SECONDS)
    assert not thread.is_alive()
    return core


async def rows_of(engine: AsyncEngine, request: Encode) -> list[bytes]:
    rows = [b""] * len(request.inputs)
    async for output in engine.encode(request):
        assert output.error is None
        for place, index in enumerate(output.indices):
            rows[index] = output.rows[4 * ROW_SIZE * place : 4 * ROW_SIZE * (place + 1)]
    return rows


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_each_of_many_concurrent_requests_gets_its_own() -> None:
    requests = [message(str(i), *range(1, 2 + i % 20)) for i in range(60)]
    runner = GatedEncoder()

    async def play(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(rows_of(engine, request)) for request in requests]
        await wait_until(lambda: engine.num_live == 60)
        runner.allow()
        for request, task in zip(requests, tasks, strict=True):
            assert await task == [row(each) for each in request.inputs]
        assert (engine.num_live, engine.stats.num_finished, engine.stats.num_waiting) == (0, 60, 0)

    core = act(play, runner)
    core.check_integrity()


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    runner = GatedEncoder()

    async def play(engine: AsyncEngine) -> None:
        large = asyncio.create_task(rows_of(engine, message("large", *[30] * 200)))
        await wait_until(runner.entered.is_set)
        small = asyncio.create_task(rows_of(engine, message("small", 2)))
        await wait_until(lambda: engine.num_live == 2)
        runner.allow(2)  # the step in flight, and the one after it
        assert await small == [row(EncoderInput([1, 1]))]
        assert not large.done()
        runner.allow()
        assert len(await large) == 200

    act(play, runner)


def test_closing_ends_the_work() -> None:
    runner = GatedEncoder()

    async def play(engine: AsyncEngine) -> None:
        outputs = engine.encode(message("a", *[30] * 100))
        runner.allow(1)
        assert len((await anext(outputs)).indices) == 1
        await outputs.aclose()
        assert engine.num_live == 0
        runner.allow()
        await rows_of(engine, message("b", 1))
        assert engine.stats.num_cancelled == 1

    act(play, runner)
    assert len(runner.steps) <= 4


def test_a_failed_step_ends_its_request() -> None:
    runner = GatedEncoder()
    runner.errors = [ValueError("no")]
    runner.allow()

    async def play(engine: AsyncEngine) -> None:
        outputs: list[EncoderOutput] = [output async for output in engine.encode(message("a", 30, 30, 30))]
        assert [output.error is not None for output in outputs] == [True]
        assert engine.num_live == 0
        await rows_of(engine, message("a", 1))

    act(play, runner)


def test_a_full_queue() -> None:
    runner = GatedEncoder()

    async def play(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(rows_of(engine, message(str(i), 30, 30))) for i in range(3)]
        await wait_until(lambda: engine.num_live == 3)
        with pytest.raises(QueueFull, match="2 requests wait, the limit is 2"):
            await rows_of(engine, message("one more", 1))
        runner.allow()
        await asyncio.gather(*tasks)

    act(play, runner, max_waiting=2)


@pytest.mark.parametrize("reason", [None, ModelUnloaded("Gone.")])
def test_the_end_of_the_worker_is_told(reason: ModelUnloaded | None) -> None:
    runner = GatedEncoder()
    if reason is None:
        runner.errors = [FatalRunnerError("the device is lost")]

    async def play(engine: AsyncEngine) -> None:
        task = asyncio.create_task(rows_of(engine, message("a", 30, 30)))
        await wait_until(runner.entered.is_set)
        if reason is None:
            runner.allow()
        else:
            engine.shut_down(reason)
        with pytest.raises(WorkerDied if reason is None else ModelUnloaded):
            await task

    act(play, runner)
