"""What chat and completions have in common: from the body to a prepared request, answered as a stream or as a whole."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from lmserve.api.body import ignored_header, in_clients_words, read_request
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.schema.stats import WithStats
from lmserve.api.schema.usage import UsageAnswer
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import DONE, EventStream, event, unless_disconnected
from lmserve.api.stats import StatsReporter
from lmserve.service.answer import Answer, ChoiceAnswer, collect
from lmserve.service.deltas import CallDelta, Delta, Finished, ReasoningDelta, TextDelta, Usage
from lmserve.service.generation import GenerationService
from lmserve.service.request import GenerationRequest

LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON has not."""

B = TypeVar("B", bound=SamplingFields)
C = TypeVar("C", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What is known of an answer before it begins."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    num_choices: int
    with_logprobs: bool
    include_usage: bool
    """Whether a stream ends with the usage."""
    stats: StatsReporter | None
    """Under /api/v0 the answer ends with what it makes."""

    def stats_of(self, usage: Usage, finished: Finished | None) -> dict[str, Any]:
        """Fields for the end of the answer: empty, or those that LM Studio adds."""
        return {} if self.stats is None or finished is None else self.stats.of(usage, finished)


class Renderer(ABC, Generic[C]):
    """Deltas in one endpoint's shapes, whose choices are ``C``."""

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._no_usage: None | msgspec.UnsetType = None if outline.include_usage else msgspec.UNSET
        self._encode = msgspec.json.Encoder().encode

    async def chunks(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream, the end mark included. Closing it closes ``deltas``."""
        begun, last = False, None
        async with aclosing(deltas):
            async for delta in deltas:
                if not begun:
                    begun = True
                    for choice in self.beginnings():
                        yield self._event(choice)
                if isinstance(delta, TextDelta | ReasoningDelta | CallDelta):
                    yield self._event(self.piece(delta))
                elif isinstance(delta, Finished):
                    last = delta
                    yield self._event(self.end(delta))
                else:
                    for chunk in self._last_chunk(delta, last):
                        yield chunk
        yield DONE

    def whole(self, answer: Answer) -> bytes:
        """The body of a whole answer."""
        choices = []
        for index, choice in enumerate(answer.choices):
            assert choice.finished is not None, "the engine ends every choice"
            choices.append(self.choice(index, choice, choice.finished.finish_reason))
        stats = self.outline.stats_of(answer.usage, answer.choices[0].finished)
        return self._encode(replace(self.answer(choices, UsageAnswer.of(answer.usage)), **stats))

    @abstractmethod
    def beginnings(self) -> list[C]:
        """How the choices of a stream begin, before any text."""

    @abstractmethod
    def piece(self, delta: TextDelta | ReasoningDelta | CallDelta) -> C:
        """More of a choice in a stream. Reasoning and calls come in chats only."""

    @abstractmethod
    def end(self, finished: Finished) -> C:
        """The end of a choice in a stream."""

    @abstractmethod
    def chunk(self, choices: list[C], usage: UsageAnswer | None | msgspec.UnsetType) -> WithStats:
        """One event of a stream."""

    @abstractmethod
    def choice(self, index: int, answer: ChoiceAnswer, finish_reason: str) -> msgspec.Struct:
        """One choice of a whole answer."""

    @abstractmethod
    def answer(self, choices: list[Any], usage: UsageAnswer) -> WithStats:
        """A whole answer, of what ``choice`` made."""

    def _event(self, choice: C) -> bytes:
        return event(self._encode(self.chunk([choice], self._no_usage)))

    def _last_chunk(self, usage: Usage, finished: Finished | None) -> list[bytes]:
        """With the usage and the statistics, where somebody asked for one of them."""
        outline = self.outline
        stats = outline.stats_of(usage, finished)
        if not (outline.include_usage or stats):
            return []
        shown = UsageAnswer.of(usage) if outline.include_usage else self._no_usage
        return [event(self._encode(replace(self.chunk([], shown), **stats)))]


@dataclass(frozen=True, slots=True)
class Dialect(Generic[B]):
    """How one kind of generation is asked for and answered."""

    body: type[B]
    id_prefix: str
    prepare: Callable[[GenerationService, str, str, B], Awaitable[GenerationRequest]]
    """Service, request id, model id and body -> the request. Its errors speak of our names of the parameters."""
    renderer: Callable[[Outline], Renderer[Any]]


@dataclass(frozen=True, slots=True)
class _Asked(Generic[B]):
    """A body, and what of it was checked before the answer begins."""

    wire: B
    include_usage: bool
    ttl_seconds: float | None
    ignored: list[str]
    headers: dict[str, str]
    """Of the answer: what the model ignores is known, and told, once the request is prepared."""


class GenerationEndpoint(Generic[B]):
    """Answers requests in one dialect. ``with_stats``: as LM Studio's REST API does."""

    def __init__(
        self, service: GenerationService, settings: ApiSettings, dialect: Dialect[B], *, with_stats: bool = False
    ) -> None:
        self._service = service
        self._settings = settings
        self._dialect = dialect
        self._with_stats = with_stats

    async def create(self, request: Request) -> ASGIApp:
        """When the client goes away the generation is cancelled at once.

        A model that is not loaded is loaded first. A stream waits for that with its headers, so that a refusal has a
        status of its own, until it is time for a comment: these say how far the load is.
        """
        wire, ignored = await read_request(request, self._dialect.body, self._settings)
        ignored += wire.ignored()
        headers = ignored_header(ignored)
        asked = _Asked(wire, wire.include_usage, wire.ttl_seconds(), ignored, headers)
        if wire.stream:
            return EventStream(
                self._chunks(asked),
                keep_alive=self._settings.keep_alive_seconds,
                headers=headers,
                status=lambda: self._service.loading(wire.model),
            )
        body = await unless_disconnected(request.receive, self._whole(asked))
        return Response(body, headers=headers, media_type="application/json")

    async def _chunks(self, asked: _Asked[B]) -> AsyncGenerator[bytes, None]:
        async with (
            self._prepared(asked) as (generation, renderer),
            aclosing(renderer.chunks(self._service.stream(generation))) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def _whole(self, asked: _Asked[B]) -> bytes:
        async with (
            self._prepared(asked) as (generation, renderer),
            aclosing(self._service.stream(generation)) as deltas,
        ):
            return renderer.whole(await collect(deltas, generation.num_choices))

    @asynccontextmanager
    async def _prepared(self, asked: _Asked[B]) -> AsyncIterator[tuple[GenerationRequest, Renderer[Any]]]:
        """The checked request and its renderer; the model stays loaded until the context ends."""
        dialect, wire = self._dialect, asked.wire
        async with self._service.use(wire.model, asked.ttl_seconds, "generate") as model_id:
            with in_clients_words(wire.names()):
                generation = await dialect.prepare(self._service, new_id(dialect.id_prefix), model_id, wire)
            asked.headers.update(ignored_header([*asked.ignored, *generation.ignored]))
            yield generation, dialect.renderer(self._outline(generation, asked.include_usage))

    def _outline(self, generation: GenerationRequest, include_usage: bool) -> Outline:
        return Outline(
            id=generation.request_id,
            created=int(time.time()),
            model=generation.model.entry.model_id,
            system_fingerprint=generation.fingerprint,
            num_choices=generation.num_choices,
            with_logprobs=generation.sampling[0].logprobs is not None,
            include_usage=include_usage,
            stats=StatsReporter.for_request(generation) if self._with_stats else None,
        )


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def clamp_logprob(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
