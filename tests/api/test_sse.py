"""A stream towards a client that does not take what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from lmserve.api import sse
from lmserve.api.sse import KEEP_ALIVE, EventStream

SECONDS = 20.0


class Client:
    """Its end of the connection. It takes ``window`` messages, and more only when there is more room."""

    def __init__(self, window: int) -> None:
        self.received: list[Message] = []
        self.num_sending = 0
        self.most_at_once = 0
        self.room = asyncio.Semaphore(window)
        self.stuck = asyncio.Event()
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.room.locked():
            self.stuck.set()
        self.num_sending += 1
        self.most_at_once = max(self.most_at_once, self.num_sending)
        try:
            await self.room.acquire()
        finally:
            self.num_sending -= 1
        self.received.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.received)


class Numbers:
    """Events from 0 to ``end``, the first after ``start`` is set."""

    def __init__(self, end: int) -> None:
        self.start = asyncio.Event()
        self.num_made = 0
        self.closed = False
        self._end = end

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            await self.start.wait()
            while self.num_made < self._end:
                self.num_made += 1
                yield b"%d," % self.num_made
        finally:
            self.closed = True


async def answer(numbers: Numbers, client: Client, keep_alive: float, status: Callable[[], str] = lambda: "") -> None:
    stream = EventStream(numbers.events(), keep_alive=keep_alive, status=status)
    await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), SECONDS)


def test_events_are_made_no_faster_than_they_are_taken() -> None:
    async def scenario() -> None:
        numbers, client = Numbers(9), Client(window=3)
        numbers.start.set()
        answering = asyncio.create_task(answer(numbers, client, keep_alive=10.0))
        await client.stuck.wait()
        assert (numbers.num_made, client.body) == (3, b"1,2,")
        for _ in range(100):
            client.room.release()
        await answering
        assert (client.body, numbers.closed) == (b"1,2,3,4,5,6,7,8,9,", True)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


@pytest.mark.parametrize(("stuck_with", "keep_alive"), [("event", 10.0), ("comment", 0.01)])
def test_a_client_that_goes_away_while_a_send_is_stuck(stuck_with: str, keep_alive: float) -> None:
    """A server may leave ``send`` waiting for good then; only ``receive`` is bound to say that the client is gone."""

    async def scenario() -> None:
        numbers, client = Numbers(9), Client(window=1)
        if stuck_with == "event":
            numbers.start.set()
        answering = asyncio.create_task(answer(numbers, client, keep_alive))
        await client.stuck.wait()
        client.gone.set()
        await answering
        assert numbers.closed
        assert (client.body, numbers.num_made) == (b"", int(stuck_with == "event"))

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_no_comments_pile_up_behind_a_stuck_send() -> None:
    async def scenario() -> None:
        numbers, client = Numbers(3), Client(window=2)
        numbers.start.set()
        answering = asyncio.create_task(answer(numbers, client, keep_alive=0.01))
        await client.stuck.wait()
        await asyncio.sleep(0.05)
        for _ in range(100):
            client.room.release()
        await answering
        assert client.body.replace(KEEP_ALIVE, b"") == b"1,2,3,"
        assert client.most_at_once == 1

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_a_client_that_never_takes_anything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "SEND_SECONDS", 0.03)

    async def scenario() -> None:
        numbers, client = Numbers(9), Client(window=1)
        numbers.start.set()
        with pytest.raises(ClientDisconnect):
            await answer(numbers, client, keep_alive=0.01)
        assert (numbers.closed, numbers.num_made) == (True, 1)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_comments_say_what_keeps_the_first_event_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """News are told at once, but only once the headers are out: before, an error still has a status of its own."""
    monkeypatch.setattr(sse, "STATUS_SECONDS", 0.01)

    async def scenario() -> None:
        numbers, client, status = Numbers(2), Client(window=1000), ["loading 1%"]
        answering = asyncio.create_task(answer(numbers, client, 0.3, lambda: status[0]))
        await asyncio.sleep(0.05)
        assert client.received == []
        while b": loading 1%" not in client.body:
            await asyncio.sleep(0.01)
        status[0] = "loading 2%"
        while b": loading 2%" not in client.body:
            await asyncio.sleep(0.01)
        numbers.start.set()
        await answering
        assert client.body.count(b": loading 2%") == 1, "the same is not said again and again"
        assert client.body.endswith(b"1,2,")

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def test_a_status_is_told_of_the_wait_only() -> None:
    async def scenario() -> None:
        numbers, client = Numbers(1), Client(window=1000)
        numbers.start.set()
        stream = EventStream(slow(numbers), keep_alive=0.02, status=lambda: "loading")
        await asyncio.wait_for(stream({"type": "http"}, client.receive, client.send), SECONDS)
        before, _, after = client.body.partition(b"1,")
        assert b"loading" not in after
        assert KEEP_ALIVE in after

    async def slow(numbers: Numbers) -> AsyncGenerator[bytes, None]:
        async for event in numbers.events():
            yield event
            await asyncio.sleep(0.2)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
