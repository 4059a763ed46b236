"""``POST /v1/chat/completions``: how a chat is asked for and answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from lmserve.api.generate import Dialect, Renderer, clamp_logprob
from lmserve.api.schema.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)
from lmserve.api.schema.usage import UsageAnswer
from lmserve.service.answer import ChoiceAnswer
from lmserve.service.deltas import CallDelta, Finished, PositionLogprobs, ReasoningDelta, TextDelta
from lmserve.service.generation import GenerationService
from lmserve.service.request import GenerationRequest


async def _prepare(
    service: GenerationService, request_id: str, model_id: str, body: ChatCompletionRequest
) -> GenerationRequest:
    options = body.options(body.num_logprobs())
    return await service.prepare_chat(request_id, model_id, body.chat(), options)


class ChatRenderer(Renderer[ChatChunkChoice]):
    """OpenAI's chat shapes: each choice begins with its role, and ends with an empty delta."""

    def beginnings(self) -> list[ChatChunkChoice]:
        return [ChatChunkChoice(i, ChatDelta("assistant", "")) for i in range(self.outline.num_choices)]

    def piece(self, delta: TextDelta | ReasoningDelta | CallDelta) -> ChatChunkChoice:
        if isinstance(delta, ReasoningDelta):
            return ChatChunkChoice(delta.choice, ChatDelta(reasoning_content=delta.text))
        if isinstance(delta, CallDelta):
            return ChatChunkChoice(delta.choice, ChatDelta(tool_calls=[_call_delta(delta)]))
        logprobs = _logprobs(delta.logprobs) if delta.logprobs else None
        return ChatChunkChoice(delta.choice, ChatDelta(content=delta.text), logprobs)

    def end(self, finished: Finished) -> ChatChunkChoice:
        return ChatChunkChoice(finished.choice, ChatDelta(), finish_reason=finished.finish_reason)

    def chunk(
        self, choices: list[ChatChunkChoice], usage: UsageAnswer | None | msgspec.UnsetType
    ) -> ChatCompletionChunk:
        o = self.outline
        return ChatCompletionChunk(
            o.id, "chat.completion.chunk", o.created, o.model, o.system_fingerprint, choices, usage
        )

    def choice(self, index: int, answer: ChoiceAnswer, finish_reason: str) -> ChatChoice:
        logprobs = _logprobs(answer.logprobs) if self.outline.with_logprobs else None
        return ChatChoice(index, _message(answer), logprobs, finish_reason)

    def answer(self, choices: list[ChatChoice], usage: UsageAnswer) -> ChatCompletion:
        o = self.outline
        return ChatCompletion(o.id, "chat.completion", o.created, o.model, choices, usage, o.system_fingerprint)


CHAT = Dialect(ChatCompletionRequest, "chatcmpl", _prepare, ChatRenderer)


def _message(answer: ChoiceAnswer) -> ChatMessage:
    calls = [ToolCall(call.id, "function", FunctionCall(call.name, call.arguments)) for call in answer.calls]
    return ChatMessage(
        "assistant",
        answer.text if answer.text or not calls else None,
        reasoning_content=answer.reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _call_delta(delta: CallDelta) -> ToolCallDelta:
    """Id, type and name come once: clients put the pieces of each string together."""
    kind: Literal["function"] | None = None if delta.id is None else "function"
    return ToolCallDelta(delta.index, delta.id, kind, FunctionDelta(delta.name, delta.arguments))


def _logprobs(positions: Sequence[PositionLogprobs]) -> ChatLogprobs:
    return ChatLogprobs([_token_logprob(position) for position in positions])


def _token_logprob(position: PositionLogprobs) -> TokenLogprob:
    sampled = position.sampled
    top = [TopLogprob(token.text, clamp_logprob(token.logprob), list(token.bytes)) for token in position.top]
    return TokenLogprob(sampled.text, clamp_logprob(sampled.logprob), list(sampled.bytes), top)
