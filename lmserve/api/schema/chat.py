"""``POST /v1/chat/completions``: the body, the answer, the chunks of a stream. Field order is OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lmserve.api.schema.fields import honoured, ignored, refused
from lmserve.api.schema.numbers import Int, integer
from lmserve.api.schema.sampling import SamplingFields
from lmserve.api.schema.stats import WithStats
from lmserve.api.schema.tools import (
    FUNCTION_CALL,
    FUNCTIONS,
    PARALLEL_TOOL_CALLS,
    REASONING_EFFORT,
    TOOL_CHOICE,
    TOOLS,
    toolbox_of,
)
from lmserve.api.schema.usage import UsageAnswer
from lmserve.errors import InvalidRequest
from lmserve.sampling_params import RANGES
from lmserve.service.chat_template import Chat
from lmserve.service.messages import DETAILS, ROLES

IMAGE_URL = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"url": {"type": "string"}, "detail": {"enum": [*DETAILS, None]}},
            "required": ["url"],
        },
    ]
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {
                    "type": "array",
                    "items": {
                        "anyOf": [
                            {"type": "string"},
                            {
                                "type": "object",
                                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                                "required": ["type", "text"],
                            },
                            {
                                "type": "object",
                                "properties": {"type": {"const": "image_url"}, "image_url": IMAGE_URL},
                                "required": ["type", "image_url"],
                            },
                            {
                                "type": "object",
                                "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
                                "required": ["type", "refusal"],
                            },
                        ]
                    },
                },
            ]
        },
    },
    "required": ["role"],
}
"""A message, in JSON Schema: what every chat template knows. Other keys are the template's to read."""
_NO_AUDIO = "audio is not offered"


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """The body. What messages may hold is the service's to say."""

    messages: Annotated[
        list[dict[str, Any]],
        honoured(
            "the chat: roles system, developer, user, assistant, tool, function; content a string, null, or an array "
            "of text parts and, for a model that reads images, image_url parts",
            allowed="at least one",
            schema={"type": "array", "minItems": 1, "items": MESSAGE},
        ),
    ]
    logprobs: Annotated[bool | None, honoured("report log-probabilities", default="false")] = None
    top_logprobs: Annotated[
        Int,
        honoured("likeliest tokens to report at each position", default="0", allowed=RANGES["top_logprobs"]),
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, honoured("variables for the chat template")] = None
    continue_final_message: Annotated[
        bool | None,
        honoured("continue the last message, which is the assistant's, instead of answering", default="false"),
    ] = None
    add_generation_prompt: Annotated[
        bool | None,
        honoured(
            "end the prompt with the beginning of an answer", default="true, unless the last message is continued"
        ),
    ] = None
    tools: Annotated[list[Any] | None, TOOLS] = None
    tool_choice: Annotated[Any, TOOL_CHOICE] = None
    parallel_tool_calls: Annotated[bool | None, PARALLEL_TOOL_CALLS] = None
    functions: Annotated[list[Any] | None, FUNCTIONS] = None
    function_call: Annotated[Any, FUNCTION_CALL] = None
    reasoning_effort: Annotated[str | None, REASONING_EFFORT] = None
    audio: Annotated[Any, refused("object", _NO_AUDIO)] = None
    modalities: Annotated[Any, refused("array of strings", _NO_AUDIO, ["text"])] = None
    prediction: Annotated[Any, refused("object", "predicted outputs are not offered")] = None
    web_search_options: Annotated[Any, refused("object", "web search is not offered")] = None
    moderation: Annotated[Any, refused("object", "moderation is not offered")] = None
    echo: Annotated[Any, refused("boolean", "a chat has no text to repeat; /v1/completions has echo", False)] = None
    metadata: Annotated[Any, ignored("object", "answers are not stored")] = None
    store: Annotated[Any, ignored("boolean", "answers are not stored")] = None
    service_tier: Annotated[Any, ignored("string", "there is one tier")] = None
    prompt_cache_key: Annotated[Any, ignored("string", "prefixes are found without a key")] = None
    prompt_cache_options: Annotated[Any, ignored("object", "prefixes are found without options")] = None
    prompt_cache_retention: Annotated[Any, ignored("string", "prefixes stay as long as memory allows")] = None
    safety_identifier: Annotated[Any, ignored("string", "it changes no answer")] = None
    verbosity: Annotated[Any, ignored("string", "no open model reads it")] = None

    def chat(self) -> Chat:
        return Chat(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            template_kwargs=self.chat_template_kwargs or {},
            toolbox=toolbox_of(self),
            reasoning_effort=self.reasoning_effort,
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


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(WithStats, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    system_fingerprint: str


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is new; absent is nothing new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(WithStats, frozen=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None | msgspec.UnsetType = msgspec.UNSET
    """null in every chunk but the last where usage was asked for, else absent."""
