"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from lmserve.api.body import ignored_header, in_clients_words, parse_body, read_body
from lmserve.api.generate import Heading, clamp_logprob, new_id, respond
from lmserve.api.schema.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    TokenLogprob,
    TopLogprob,
)
from lmserve.api.schema.fields import CHAT_REFUSED
from lmserve.api.schema.usage import UsageAnswer
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import DONE, event
from lmserve.service.answer import Answer
from lmserve.service.deltas import Delta, Finished, PositionLogprobs, TextDelta, Usage
from lmserve.service.generation import GenerationService


class ChatEndpoint:
    """Answers chats."""

    def __init__(self, service: GenerationService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> ASGIApp:
        body = await read_body(request, self._settings.max_body_bytes)
        wire, ignored = parse_body(body, ChatCompletionRequest, CHAT_REFUSED)
        include_usage = wire.include_usage
        with in_clients_words(wire.names()):
            options = wire.options(wire.num_logprobs())
            generation = await self._service.prepare_chat(new_id("chatcmpl"), wire.model, wire.chat(), options)
        with_logprobs = options.logprobs is not None
        return await respond(
            request,
            self._service,
            generation,
            ChatRenderer(Heading.of(generation), generation.num_choices, with_logprobs, include_usage=include_usage),
            stream=bool(wire.stream),
            keep_alive=self._settings.keep_alive_seconds,
            headers=ignored_header(ignored + wire.ignored()),
        )


class ChatRenderer:
    """Deltas in OpenAI's chat shapes."""

    def __init__(self, heading: Heading, num_choices: int, with_logprobs: bool, *, include_usage: bool) -> None:
        self._heading = heading
        self._num_choices = num_choices
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._no_usage: None | msgspec.UnsetType = None if include_usage else msgspec.UNSET
        self._encode = msgspec.json.Encoder().encode

    async def chunks(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """Each choice begins with its role, and ends with an empty delta that has the finish reason."""
        begun = False
        async with aclosing(deltas):
            async for delta in deltas:
                if not begun:
                    begun = True
                    for choice in range(self._num_choices):
                        yield self._chunk(ChatChunkChoice(choice, ChatDelta("assistant", "")))
                match delta:
                    case TextDelta(choice, text, logprobs):
                        shown = _logprobs(logprobs) if logprobs else None
                        yield self._chunk(ChatChunkChoice(choice, ChatDelta(content=text), shown))
                    case Finished(choice, reason):
                        yield self._chunk(ChatChunkChoice(choice, ChatDelta(), finish_reason=reason.value))
                    case Usage() if self._include_usage:
                        yield self._chunk(None, UsageAnswer.of(delta))
        yield DONE

    def answer(self, answer: Answer) -> bytes:
        heading = self._heading
        choices = []
        for index, choice in enumerate(answer.choices):
            assert choice.finished is not None, "the engine ends every choice"
            logprobs = _logprobs(choice.logprobs) if self._with_logprobs else None
            message = ChatMessage("assistant", choice.text)
            choices.append(ChatChoice(index, message, logprobs, choice.finished.reason.value))
        completion = ChatCompletion(
            heading.id,
            "chat.completion",
            heading.created,
            heading.model,
            choices,
            UsageAnswer.of(answer.usage),
            heading.system_fingerprint,
        )
        return self._encode(completion)

    def _chunk(self, choice: ChatChunkChoice | None, usage: UsageAnswer | None = None) -> bytes:
        heading = self._heading
        chunk = ChatCompletionChunk(
            heading.id,
            "chat.completion.chunk",
            heading.created,
            heading.model,
            heading.system_fingerprint,
            [] if choice is None else [choice],
            self._no_usage if usage is None else usage,
        )
        return event(self._encode(chunk))


def _logprobs(positions: Sequence[PositionLogprobs]) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(position) for position in positions])


def _token_logprob(position: PositionLogprobs) -> TokenLogprob:
    sampled = position.sampled
    top = [TopLogprob(token.text, clamp_logprob(token.logprob), list(token.bytes)) for token in position.top]
    return TokenLogprob(sampled.text, clamp_logprob(sampled.logprob), list(sampled.bytes), top)
