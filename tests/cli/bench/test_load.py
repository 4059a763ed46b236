"""The clients against a real server on a free port, small enough to see everything it got."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from lmserve.cli.bench.load import LoadFailed, Messages, Target, arrivals, closed_loop, mixed_load, open_loop
from lmserve.cli.bench.results import Timing


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def content(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}})
NOTHING = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0}})
ANSWER = (b": keep-alive\n\n", ROLE, content("one"), content(" two"), USAGE, b"data: [DONE]\n\n")


class StubServer:
    """Answers every request with the same events and remembers what it saw.

    Nobody is answered before ``crowd`` requests have been open at once.
    """

    def __init__(self, status: str, events: Iterable[bytes], crowd: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = 0
        self._status, self._events, self._crowd = status, tuple(events), crowd
        self._open = 0
        self._crowded = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        self.bodies.append(json.loads(await reader.readexactly(int(length.split(b":")[1]))))
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        if self._open >= self._crowd:
            self._crowded.set()
        await asyncio.wait_for(self._crowded.wait(), 20)
        writer.write(
            f"HTTP/1.1 {self._status}\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".encode()
        )
        for data in self._events:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)
        self._open -= 1
        writer.close()


@contextlib.asynccontextmanager
async def serving(server: StubServer) -> AsyncIterator[Target]:
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        yield Target(f"http://127.0.0.1:{port}", "some-model")


def chats(prompts: list[str]) -> list[Messages]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def run_load(
    prompts: list[str], streams: int, events: Iterable[bytes] = ANSWER, status: str = "200 OK"
) -> tuple[StubServer, list[Timing]]:
    server = StubServer(status, events, crowd=streams)
    ticks = itertools.count(1.0)

    async def run() -> list[Timing]:
        async with serving(server) as target:
            return await closed_loop(target, chats(prompts), streams=streams, max_tokens=7, clock=lambda: next(ticks))

    return server, asyncio.run(run())


def test_every_prompt_is_sent_once_and_never_more_than_the_streams_at_once() -> None:
    prompts = [f"prompt {i}" for i in range(11)]
    server, timings = run_load(prompts, streams=3)
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == sorted(prompts)
    assert server.most_at_once == 3
    assert len(timings) == 11


def test_the_request_is_greedy_and_streams() -> None:
    server, _ = run_load(["hello"], streams=1)
    assert server.bodies == [
        {
            "model": "some-model",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]


def test_first_and_last_token_are_those_with_text_and_counts_are_the_servers() -> None:
    """On a clock that ticks when it is read: at the sending and at each text, not at the role, usage or end."""
    _, timings = run_load(["hello"], streams=1, events=(*ANSWER[:3], content(" more"), *ANSWER[3:]))
    assert timings == [Timing(1.0, 2.0, 4.0, prompt_tokens=9, completion_tokens=3, gaps=(1.0, 1.0))]


@pytest.mark.parametrize(
    ("events", "status", "message"),
    [
        ((b'{"error": {"message": "no such field"}}',), "422 Unprocessable", "422: .*no such field"),
        ((content("one"), event({"error": {"message": "worker died"}})), "200 OK", "worker died"),
        ((content("one"),), "200 OK", "without tokens or without usage"),
        ((NOTHING,), "200 OK", "without tokens or without usage"),
    ],
)
def test_a_request_that_fails_is_an_error_with_the_servers_words(
    events: tuple[bytes, ...], status: str, message: str
) -> None:
    with pytest.raises(LoadFailed, match=message):
        run_load(["hello"], streams=1, events=events, status=status)


def test_tokens_without_text_count_from_the_end_of_the_stream() -> None:
    _, timings = run_load(["hello"], streams=1, events=(ROLE, USAGE))
    assert timings == [Timing(1.0, 2.0, 2.0, prompt_tokens=9, completion_tokens=3)]


def test_arrivals_are_random_and_the_same_for_the_same_seed() -> None:
    times = arrivals(4000, rate=50.0, seed=1)
    assert times == arrivals(4000, rate=50.0, seed=1) != arrivals(4000, rate=50.0, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(80.0, rel=0.1)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """Nobody is answered before all five are there, which in a closed loop of fewer would never be."""
    server = StubServer("200 OK", ANSWER, crowd=5)

    async def run() -> list[Timing]:
        async with serving(server) as target:
            return await open_loop(target, chats([f"{i}" for i in range(5)]), rate=1000.0, max_tokens=3)

    assert len(asyncio.run(run())) == server.most_at_once == 5


def test_a_mixed_load_begins_with_the_chats_and_has_gaps_of_the_reading_only() -> None:
    server = StubServer("200 OK", (ROLE, *(content(f" {i}") for i in range(40)), USAGE), crowd=1)

    async def run() -> None:
        async with serving(server) as target:
            load = await mixed_load(
                target, chats(["a", "b"]), chats(["long"])[0], chats([f"short {i}" for i in range(9)]), max_tokens=40
            )
            assert len(load.chats) == 2
            assert load.long.prompt_tokens == 9
            for timing in load.chats:
                assert sum(timing.gaps) <= load.long.first_token - load.long.sent + timing.last_token - timing.sent

    asyncio.run(run())
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert set(asked[:2]) == {"a", "b"}
    assert "long" in asked[2:4]
    assert [body["max_tokens"] for body in server.bodies][:2] == [40, 40]
