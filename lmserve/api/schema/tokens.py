"""``POST /tokenize``, ``/detokenize`` and ``/apply-template``: bodies and answers."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from lmserve.api.schema.chat import MESSAGE
from lmserve.api.schema.fields import honoured
from lmserve.api.schema.sampling import MODEL
from lmserve.api.schema.tools import (
    FUNCTION_CALL,
    FUNCTIONS,
    PARALLEL_TOOL_CALLS,
    REASONING_EFFORT,
    TOOL_CHOICE,
    TOOL_FIELDS,
    TOOLS,
    toolbox_of,
)
from lmserve.errors import InvalidRequest
from lmserve.service.chat_template import Chat

_OF_CHATS = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt", *TOOL_FIELDS)
_OF_TEXTS = ("add_special_tokens",)


class ChatFields(msgspec.Struct, kw_only=True):
    """A chat to be rendered."""

    model: Annotated[str | None, MODEL] = None
    messages: Annotated[
        list[dict[str, Any]] | None,
        honoured("the chat, as in /v1/chat/completions", schema={"type": ["array", "null"], "items": MESSAGE}),
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, honoured("variables for the chat template")] = None
    continue_final_message: Annotated[bool | None, honoured("as in /v1/chat/completions", default="false")] = None
    add_generation_prompt: Annotated[
        bool | None,
        honoured("as in /v1/chat/completions", default="true, unless the last message is continued"),
    ] = None
    tools: Annotated[list[Any] | None, TOOLS] = None
    tool_choice: Annotated[Any, TOOL_CHOICE] = None
    parallel_tool_calls: Annotated[bool | None, PARALLEL_TOOL_CALLS] = None
    functions: Annotated[list[Any] | None, FUNCTIONS] = None
    function_call: Annotated[Any, FUNCTION_CALL] = None
    reasoning_effort: Annotated[str | None, REASONING_EFFORT] = None

    def chat(self) -> Chat | None:
        if self.messages is None:
            return None
        return Chat(
            messages=self.messages,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            template_kwargs=self.chat_template_kwargs or {},
            toolbox=toolbox_of(self),
            reasoning_effort=self.reasoning_effort,
        )


class TokenizeRequest(ChatFields, kw_only=True):
    """A text or a chat."""

    prompt: Annotated[str | None, honoured("the text")] = None
    content: Annotated[str | None, honoured("another name of prompt")] = None
    add_special_tokens: Annotated[
        bool | None,
        honoured("of a text: with the tokens that begin a sequence, as /v1/completions has them", default="true"),
    ] = None
    return_token_strs: Annotated[bool | None, honoured("with each token's text", default="false")] = None

    def text(self) -> str | None:
        """The text; None: there is a chat.

        Raises:
            InvalidRequest: there is neither, or more than one, or a field that goes with the other.
        """
        given = [value for value in (self.prompt, self.content, self.messages) if value is not None]
        if len(given) != 1:
            raise InvalidRequest("Exactly one of prompt, content and messages must be given.", "prompt")
        names, kind = (_OF_CHATS, "a text") if self.messages is None else (_OF_TEXTS, "messages")
        for name in names:
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name} does not go with {kind}.", name)
        return self.content if self.prompt is None else self.prompt


class ApplyTemplateRequest(ChatFields, kw_only=True):
    """A chat."""


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids."""

    tokens: Annotated[list[int], honoured("token ids")]
    model: Annotated[str | None, MODEL] = None


class TokenizeAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    prompt: str


class ApplyTemplateAnswer(msgspec.Struct, frozen=True):
    prompt: str
    """What the model receives, as text."""
    count: int
    tokens: list[int]
