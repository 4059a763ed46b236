"""A chat made into a prompt by the tokenizer's own template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from lmserve.errors import InvalidRequest
from lmserve.service.messages import check_nesting, normalize_messages
from lmserve.service.model_text import ModelText


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model receives. ``text`` is None where the client sent token ids."""

    text: str | None
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat as the client wrote it."""

    messages: Sequence[dict[str, Any]]
    add_generation_prompt: bool | None = None
    """None: unless the last message is to be continued."""
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """Renders chats with one model's template.

    Control tokens that people write in messages stay text: such a chat is encoded in pieces, any other as one text.
    Where this version of transformers cannot do that, a message that holds a special token is refused.
    """

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self._apply = text.tokenizer.apply_chat_template
        parameters = inspect.signature(self._apply).parameters
        self._reserved = frozenset(parameters) | {"messages"}
        self._can_sanitize = "sanitize_control_tokens" in parameters
        added = [token for token in text.tokenizer.added_tokens_decoder.values() if not str(token).isspace()]
        names = [str(token) for token in added if self._can_sanitize or token.special]
        self._control_token = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    @property
    def source(self) -> str | None:
        """The template in Jinja; None if the model has none."""
        try:
            return str(self._text.tokenizer.get_chat_template())
        except ValueError:
            return None

    def render(self, chat: Chat) -> Prompt:
        """The prompt of a chat.

        Raises:
            InvalidRequest: there is no template, the messages are malformed, or the template refuses them.
        """
        source = self.source
        if source is None:
            raise InvalidRequest(
                "This model has no chat template, so it cannot be asked with messages; use /v1/completions.", "messages"
            )
        messages = normalize_messages(chat.messages, source)
        options = self._options(chat)
        try:
            text = str(self._apply(messages, tokenize=False, **options))
            if self._has_control_token([messages, chat.template_kwargs]):
                return Prompt(text, self._encode_in_pieces(messages, options))
        except jinja2.TemplateError as error:
            raise InvalidRequest(error.message or "The chat template refuses these messages.", "messages") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(f"The chat template cannot render these messages: {error}", "messages") from error
        return Prompt(text, self._text.encode_rendered(text))

    def _encode_in_pieces(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        if not self._can_sanitize:
            raise InvalidRequest(
                "The messages hold a control token, which the server's version of transformers cannot keep as text.",
                "messages",
            )
        return self._text.encode_chat(messages, **options)

    def _options(self, chat: Chat) -> dict[str, Any]:
        if chat.continue_final_message and chat.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        if chat.continue_final_message and chat.messages and chat.messages[-1].get("role") != "assistant":
            raise InvalidRequest(
                "continue_final_message needs a last message of the assistant.", "continue_final_message"
            )
        for name in chat.template_kwargs:
            if name in self._reserved:
                path = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{path} is not the template's to decide.", path)
        check_nesting(chat.template_kwargs, "chat_template_kwargs")
        generation_prompt = chat.add_generation_prompt
        if generation_prompt is None:
            generation_prompt = not chat.continue_final_message
        return {
            "add_generation_prompt": generation_prompt,
            "continue_final_message": chat.continue_final_message,
            **chat.template_kwargs,
        }

    def _has_control_token(self, value: object) -> bool:
        if isinstance(value, str):
            return self._control_token.search(value) is not None
        if isinstance(value, dict):
            return any(map(self._has_control_token, value.values()))
        return isinstance(value, list) and any(map(self._has_control_token, value))
