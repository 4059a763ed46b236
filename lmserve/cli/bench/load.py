"""Streaming chats over HTTP, many at once, and when their tokens came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from lmserve.cli.bench.results import Timing
from lmserve.errors import LMServeError

Clock = Callable[[], float]
Messages = list[dict[str, str]]
REQUEST_SECONDS = 1800.0


class LoadFailed(LMServeError):
    """A request did not end as it should; the message has the server's words."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI's chat completions."""

    base_url: str
    model: str
    api_key: str = ""
    extra_body: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})
    """Fields beyond the common ones that this server understands."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[httpx.AsyncClient]:
        """No proxy leads to a server that is measured, and each request has a connection of its own: some servers close
        a used one just when the next request is on its way."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(REQUEST_SECONDS, connect=10.0)
        async with httpx.AsyncClient(
            base_url=self.base_url, headers=headers, timeout=timeout, limits=limits, trust_env=False
        ) as client:
            yield client


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


async def ask(
    client: httpx.AsyncClient,
    target: Target,
    messages: Messages,
    max_tokens: int,
    clock: Clock = time.perf_counter,
    on_first: Callable[[], None] = lambda: None,
) -> Timing:
    """One streamed chat, greedy. ``on_first`` hears of its first text, or that there will be none.

    Raises:
        LoadFailed: the request was refused, failed or ended early.
    """
    body = {
        "model": target.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra_body,
    }
    times: list[float] = []
    usage: _Usage | None = None
    sent = ended = clock()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise LoadFailed(f"a request was refused with {response.status_code}: {text[:500]}")
            async for chunk in _chunks(response):
                if any(choice.delta.content or choice.delta.reasoning_content for choice in chunk.choices):
                    times.append(clock())
                    if len(times) == 1:
                        on_first()
                if chunk.usage is not None:
                    usage, ended = chunk.usage, clock()
    except httpx.HTTPError as error:
        raise LoadFailed(f"a request failed: {type(error).__name__} {error}") from error
    finally:
        if not times:
            on_first()
    if usage is None or usage.completion_tokens == 0:
        raise LoadFailed("a stream ended without tokens or without usage")
    times = times or [ended]  # tokens that are no text
    gaps = tuple(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    return Timing(sent, times[0], times[-1], usage.prompt_tokens, usage.completion_tokens, gaps)


async def _chunks(response: httpx.Response) -> AsyncIterator[_Chunk]:
    """The events of a stream that hold data, without the end mark."""
    rest = b""
    async for data in response.aiter_bytes():
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            chunk = _decode(event[6:])
            if chunk.error is not None:
                raise LoadFailed(f"a stream broke off: {chunk.error}")
            yield chunk


async def closed_loop(
    target: Target, chats: Sequence[Messages], *, streams: int, max_tokens: int, clock: Clock = time.perf_counter
) -> list[Timing]:
    """Sends all chats over ``streams`` clients: each sends its next one when its last one is answered."""
    waiting = iter(chats)
    async with target.connect() as client:

        async def one_client() -> list[Timing]:
            return [await ask(client, target, chat, max_tokens, clock) for chat in waiting]

        each = await asyncio.gather(*(one_client() for _ in range(streams)))
    return [timing for timings in each for timing in timings]


async def open_loop(
    target: Target, chats: Sequence[Messages], *, rate: float, max_tokens: int, seed: int = 0
) -> list[Timing]:
    """Sends the chats at random times, ``rate`` in a second on average, whoever has been answered by then."""
    loop = asyncio.get_running_loop()
    async with target.connect() as client:
        start = loop.time()

        async def one(chat: Messages, at: float) -> Timing:
            await asyncio.sleep(max(0.0, start + at - loop.time()))
            return await ask(client, target, chat, max_tokens)

        times = arrivals(len(chats), rate, seed)
        return list(await asyncio.gather(*(one(chat, at) for chat, at in zip(chats, times, strict=True))))


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds of a Poisson process: the same for the same seed."""
    draw = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """What came of a long prompt among others."""

    chats: list[Timing]
    """That decoded all the while; their gaps are those while the long prompt was being read."""
    shorts: list[Timing]
    """That came in meanwhile, one after the other."""
    long: Timing


async def mixed_load(
    target: Target,
    chats: Sequence[Messages],
    long: Messages,
    shorts: Sequence[Messages],
    *,
    max_tokens: int,
    clock: Clock = time.perf_counter,
) -> MixedLoad:
    """Chats decode; once all have begun a long prompt comes, and short ones, one after the other, until it is read."""
    begun = asyncio.Semaphore(0)
    async with target.connect() as client:
        running = [asyncio.create_task(ask(client, target, chat, max_tokens, clock, begun.release)) for chat in chats]
        for _ in running:
            await begun.acquire()
        reading = asyncio.create_task(ask(client, target, long, 1, clock))
        answered = []
        for short in shorts:
            if reading.done():
                break
            answered.append(await ask(client, target, short, 1, clock))
        read = await reading
        ended = await asyncio.gather(*running)
    return MixedLoad([_during(timing, read) for timing in ended], answered, read)


def _during(timing: Timing, read: Timing) -> Timing:
    """With the gaps that ended while the long prompt was being read."""
    gaps, now = [], timing.first_token
    for gap in timing.gaps:
        now += gap
        if read.sent <= now <= read.first_token:
            gaps.append(gap)
    return msgspec.structs.replace(timing, gaps=tuple(gaps))
