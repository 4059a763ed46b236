"""A closed loop of streaming chat clients over HTTP, and the prompts that they send."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.figures import RequestTiming

WORDS = (
    *("river", "stone", "window", "garden", "letter", "silver", "morning", "engine", "market", "shadow", "bridge"),
    *("winter", "paper", "candle", "forest", "ocean", "ladder", "mirror", "planet", "basket", "thunder", "pocket"),
)


class LoadError(Exception):
    """A request did not end as it should; the message has the server's words."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks OpenAI's chat completions."""

    base_url: str
    model: str
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Fields beyond the common ones that this server understands."""


def make_prompts(count_tokens: Callable[[str], int], *, number: int, num_tokens: int, seed: int) -> list[str]:
    """Distinct prompts of ``num_tokens`` tokens, or one or two fewer where no word fits.

    They differ from the first word on, so that a prefix cache finds the template's tokens and no more.

    Args:
        count_tokens: length of a prompt as the model receives it, template and all.
        seed: prompts of different seeds are different.
    """
    chosen = random.Random(seed)
    return [_make_prompt(count_tokens, f"{seed}.{i}", num_tokens, chosen) for i in range(number)]


def _make_prompt(count_tokens: Callable[[str], int], first_word: str, num_tokens: int, chosen: random.Random) -> str:
    words = [first_word, *chosen.choices(WORDS, k=num_tokens)]
    while len(words) > 1 and count_tokens(" ".join(words)) > num_tokens:
        words.pop()
    while count_tokens(" ".join([*words, "a"])) <= num_tokens:
        words.append("a")
    return " ".join(words)


async def closed_loop(
    target: Target,
    prompts: list[str],
    *,
    streams: int,
    max_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[RequestTiming]:
    """Sends all prompts over ``streams`` clients: each sends its next prompt when its last one is answered.

    Raises:
        LoadError: a request was refused, failed or ended early.
    """
    waiting = iter(prompts)
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10.0), limits=limits, trust_env=False) as client:

        async def one_client() -> list[RequestTiming]:
            return [await _complete(client, target, prompt, max_tokens, clock) for prompt in waiting]

        return [
            timing for timings in await asyncio.gather(*(one_client() for _ in range(streams))) for timing in timings
        ]


async def _complete(
    client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int, clock: Callable[[], float]
) -> RequestTiming:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **target.extra_body,
    }
    first = last = None
    usage: dict[str, int] | None = None
    sent = clock()
    async with client.stream("POST", f"{target.base_url}/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise LoadError(f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:500]}")
        async for line in response.aiter_lines():
            chunk = _parse(line)
            if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                last = clock()
                first = first or last
            usage = chunk.get("usage") or usage
    if first is None or last is None or usage is None:
        raise LoadError("the stream ended without text or without usage")
    return RequestTiming(sent, first, last, usage["prompt_tokens"], usage["completion_tokens"])


def _parse(line: str) -> dict[str, Any]:
    """The chunk in one line of server-sent events; nothing for an empty line, a comment or the end mark."""
    data = line.removeprefix("data: ")
    if data == line or data == "[DONE]":
        return {}
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise LoadError(f"the stream broke off: {chunk['error']}")
    return chunk
