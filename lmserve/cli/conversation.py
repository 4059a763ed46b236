"""A conversation with a model: what was said, and how the next answer is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmserve.cli.client import Disconnected, ServerClient

OWN_FIELDS = frozenset({"messages", "model", "n", "stream", "stream_options"})
"""Of the request's body; everything else is the user's to set."""


@dataclass(slots=True)
class Answer:
    """One answer, as far as it has come."""

    text: str = ""
    finish_reason: str | None = None
    """None: it was stopped, or is not complete."""
    usage: Mapping[str, Any] | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    ignored: str = ""
    """Fields that the server does not heed, by its own words."""

    def figures(self) -> str:
        """For people, in one line."""
        usage = self.usage or {}
        count = usage.get("completion_tokens", 0)
        after_first = self.seconds - self.first_token_seconds
        speed = f"{(count - 1) / after_first:.1f} tokens/s, " if count > 1 and after_first > 0 else ""
        return (
            f"{count} tokens, {speed}{self.first_token_seconds:.2f} s to the first, "
            f"{usage.get('prompt_tokens', 0)} in the prompt, {self.finish_reason or 'stopped'}"
        )


@dataclass(slots=True)
class Conversation:
    """Owns the history. It always ends with an answer: a turn that has none is taken back."""

    model: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other fields of the request: temperature, seed, …"""
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(what the user said, what the model answered)."""

    def messages(self) -> list[dict[str, str]]:
        """As the server takes them."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.turns:
            found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return found

    def ask(self, client: ServerClient, question: str, answer: Answer) -> Generator[str, None, None]:
        """The pieces of the answer as they come; ``answer`` is filled meanwhile. Closing it stops the server's work.

        The history is left as it is: whether this becomes a turn is the caller's to say.
        """
        body = {
            **self.settings,
            "model": self.model,
            "messages": [*self.messages(), {"role": "user", "content": encodable(question)}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began = time.monotonic()
        with client.events("POST", "/v1/chat/completions", dict[str, Any], body=body) as events:
            answer.ignored = events.headers.get("x-lmserve-ignored", "")
            for chunk in events.data:
                answer.seconds = time.monotonic() - began
                answer.usage = chunk.get("usage") or answer.usage
                for choice in chunk.get("choices") or ():
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    piece = choice.get("delta", {}).get("content") or ""
                    if piece:
                        answer.first_token_seconds = answer.first_token_seconds or answer.seconds
                        answer.text += piece
                        yield piece
        if answer.finish_reason is None:
            raise Disconnected(f"{client.address} ended its answer in the middle")

    def set(self, name: str, text: str) -> None:
        """``text`` is JSON, or else a text as it stands; null, or nothing, takes the setting back.

        Raises:
            ValueError: the field is none of the user's.
        """
        if name in OWN_FIELDS:
            raise ValueError(f"{name} is the chat's own")
        value = _read_value(text)
        if value is None:
            self.settings.pop(name, None)
        else:
            self.settings[name] = value


def encodable(text: str) -> str:
    """The text as UTF-8 can have it: what the terminal sent as broken bytes becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read_value(text: str) -> Any:
    if not text:
        return None
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # no JSON, or what JSON cannot carry: NaN, half a character
        return encodable(text)
    return value
