"""``POST /v1/completions``: no template, ever."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from lmserve.api.body import ignored_header, in_clients_words, parse_body, read_body
from lmserve.api.generate import Heading, clamp_logprob, new_id, respond
from lmserve.api.schema.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from lmserve.api.schema.fields import COMPLETION_REFUSED
from lmserve.api.schema.usage import UsageAnswer
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import DONE, event
from lmserve.service.answer import Answer
from lmserve.service.deltas import Delta, Finished, PositionLogprobs, TextDelta, TokenLogprob, Usage
from lmserve.service.generation import GenerationService


class CompletionEndpoint:
    """Continues prompts."""

    def __init__(self, service: GenerationService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        body = await read_body(request, self._settings.max_body_bytes)
        wire, ignored = parse_body(body, CompletionRequest, COMPLETION_REFUSED)
        include_usage = wire.include_usage
        with in_clients_words(wire.names()):
            options = wire.options(wire.num_logprobs())
            prompts = wire.prompts()
            generation = await self._service.prepare_completion(new_id("cmpl"), wire.model, prompts, options)
        with_logprobs = options.logprobs is not None
        return await respond(
            request,
            self._service,
            generation,
            CompletionRenderer(Heading.of(generation), with_logprobs, include_usage=include_usage),
            stream=bool(wire.stream),
            keep_alive=self._settings.keep_alive_seconds,
            headers=ignored_header(ignored + wire.ignored()),
        )


class CompletionRenderer:
    """Deltas in the shapes of OpenAI's older endpoint."""

    def __init__(self, heading: Heading, with_logprobs: bool, *, include_usage: bool) -> None:
        self._heading = heading
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._no_usage: None | msgspec.UnsetType = None if include_usage else msgspec.UNSET
        self._encode = msgspec.json.Encoder().encode

    async def chunks(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """Each choice ends with an empty text that has the finish reason."""
        async with aclosing(deltas):
            async for delta in deltas:
                match delta:
                    case TextDelta(choice, text, logprobs):
                        shown = _logprobs(logprobs) if logprobs else None
                        yield self._event([CompletionChoice(choice, text, shown)], self._no_usage)
                    case Finished(choice, reason):
                        yield self._event([CompletionChoice(choice, "", None, reason.value)], self._no_usage)
                    case Usage() if self._include_usage:
                        yield self._event([], UsageAnswer.of(delta))
        yield DONE

    def answer(self, answer: Answer) -> bytes:
        choices = []
        for index, choice in enumerate(answer.choices):
            assert choice.finished is not None, "the engine ends every choice"
            logprobs = _logprobs(choice.logprobs) if self._with_logprobs else None
            choices.append(CompletionChoice(index, choice.text, logprobs, choice.finished.reason.value))
        return self._encode(self._completion(choices, UsageAnswer.of(answer.usage)))

    def _event(self, choices: list[CompletionChoice], usage: UsageAnswer | None | msgspec.UnsetType) -> bytes:
        return event(self._encode(self._completion(choices, usage)))

    def _completion(self, choices: list[CompletionChoice], usage: UsageAnswer | None | msgspec.UnsetType) -> Completion:
        heading = self._heading
        return Completion(
            heading.id,
            "text_completion",
            heading.created,
            heading.model,
            choices,
            heading.system_fingerprint,
            usage,
        )


def _logprobs(positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=[position.text_offset for position in positions],
        token_logprobs=[clamp_logprob(position.sampled.logprob) for position in positions],
        tokens=[_name(position.sampled) for position in positions],
        top_logprobs=[_top(position) for position in positions],
    )


def _top(position: PositionLogprobs) -> dict[str, float]:
    """The likeliest tokens and the sampled one; of tokens that look the same, the likelier."""
    top: dict[str, float] = {}
    for token in (*position.top, position.sampled):
        top.setdefault(_name(token), clamp_logprob(token.logprob))
    return top


def _name(token: TokenLogprob) -> str:
    """The token's text or, where it is no text by itself, its bytes as OpenAI writes them."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
