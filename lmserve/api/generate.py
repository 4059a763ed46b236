"""What chat and completions have in common: one prepared request, answered as a stream or as a whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from lmserve.api.sse import EventStream, unless_disconnected
from lmserve.service.answer import Answer, collect
from lmserve.service.deltas import Delta
from lmserve.service.generation import GenerationService
from lmserve.service.request import GenerationRequest

LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON has not."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What every answer and every chunk of it begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, generation: GenerationRequest) -> Heading:
        return cls(generation.request_id, int(time.time()), generation.model.entry.model_id, generation.fingerprint)


class Renderer(Protocol):
    """One endpoint's shapes."""

    def chunks(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream, the end mark included. Closing it closes ``deltas``."""
        ...

    def answer(self, answer: Answer) -> bytes:
        """The body of a whole answer."""
        ...


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def clamp_logprob(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


async def respond(
    request: Request,
    service: GenerationService,
    generation: GenerationRequest,
    renderer: Renderer,
    *,
    stream: bool,
    keep_alive: float,
    headers: Mapping[str, str],
) -> ASGIApp:
    """The answer to a prepared request. When the client goes away the generation is cancelled at once."""
    deltas = service.stream(generation)
    if stream:
        return EventStream(renderer.chunks(deltas), keep_alive=keep_alive, headers=headers)
    async with aclosing(deltas):
        answer = await unless_disconnected(request.receive, collect(deltas, generation.num_choices))
    return Response(renderer.answer(answer), headers=headers, media_type="application/json")
