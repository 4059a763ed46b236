"""``POST /v1/chat/completions``: the body, the answer, the chunks of a stream. Field order is OpenAI's."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from lmserve.api.schema.numbers import Int, integer
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.schema.usage import UsageAnswer
from lmserve.errors import InvalidRequest
from lmserve.service.chat_template import Chat


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """The body. What messages may hold is the service's to say."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: Int = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def chat(self) -> Chat:
        return Chat(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            template_kwargs=self.chat_template_kwargs or {},
        )

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to report at each position; None: no log-probabilities."""
        top = integer(self.top_logprobs, "top_logprobs")
        if self.logprobs:
            return top or 0
        if top:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", "top_logprobs")
        return None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    system_fingerprint: str


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is new; absent is nothing new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None | msgspec.UnsetType = msgspec.UNSET
    """null in every chunk but the last where usage was asked for, else absent."""
