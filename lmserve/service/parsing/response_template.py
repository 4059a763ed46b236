"""Outputs of models whose tokenizer brings a response template: transformers' parser, as one of ours.

Its calls come whole. What it cannot read becomes content, as it was written, and so does all that follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from lmserve.service.parsing.events import CONTROL_BEGIN, CONTROL_END, Event
from lmserve.service.parsing.family import ParserInput, Reasoning
from lmserve.service.parsing.reader import CONTROL, Stops
from lmserve.service.parsing.turn import Turn
from lmserve.service.parsing.typed_values import json_text

_CALLS = "tool_calls"
_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
_NOTHING = Stops(())

_THINK = Reasoning("<think>", "</think>")

MakeParser = Callable[[str, Sequence[dict[str, Any]]], Any]
"""Of the prompt and the tools, as chat templates get them, transformers' ``ResponseParser``."""


def parser_maker(tokenizer: Any) -> MakeParser:
    """How to make parsers of this tokenizer's template. Every field may be missing: what was said is still to be told.

    Raises ValueError where the template is none.
    """
    template = tokenizer.response_template
    if not isinstance(template, dict) or not isinstance(fields := template.get("fields"), dict):
        raise ValueError("the tokenizer's response_template has no fields")
    lenient = {
        **template,
        "fields": {
            name: {**field, "optional": True} if isinstance(field, dict) else field for name, field in fields.items()
        },
    }

    def make(prompt: str, tools: Sequence[dict[str, Any]]) -> Any:
        return tokenizer.get_response_parser(lenient, prefix=prompt, tools=list(tools) or None)

    try:
        make("", ())
    except Exception as error:
        raise ValueError(f"the tokenizer's response_template cannot be used: {error}") from error
    return make


def template_reasoning(tokenizer: Any) -> Reasoning | None:
    """The markers of the template's reasoning, if it tells it apart; the usual ones, where it only has patterns."""
    for name, field in tokenizer.response_template["fields"].items():
        if name in _REASONING:
            begin, end = field.get("open"), field.get("close")
            return Reasoning(begin, end) if isinstance(begin, str) and isinstance(end, str) else _THINK
    return None


class ResponseTemplateParser:
    """An ``OutputParser`` around a ``ResponseParser``."""

    def __init__(self, given: ParserInput, make: MakeParser) -> None:
        self._turn = Turn(given)
        self._input = _Input()
        self._field: str | None = None
        self._pending: list[tuple[int, str]] = []
        self._gave_up = False
        tools = [
            {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in given.tools
        ]
        self._parser: Any = None
        try:
            self._parser = make(given.prompt, tools)
            for event in self._parser.initial_events:
                self._follow_prompt(event)
        except Exception:  # a template's expressions may fail on any text
            self._parser = None

    @property
    def is_reasoning(self) -> bool:
        return self._turn.is_reasoning

    def push(self, text: str) -> Sequence[Event]:
        for piece in self._input.take(text):
            self._feed(piece)
        return self._turn.drain()

    def finish(self) -> Sequence[Event]:
        for piece in self._input.take_rest():
            self._feed(piece)
        self._feed(None)
        self._give_up_call()
        for start, text in self._input.rest() if self._gave_up else ():
            self._turn.content(start, text)
        self._turn.finish()
        return self._turn.drain()

    def _feed(self, piece: str | None) -> None:
        """None: the output has ended."""
        if self._parser is not None:
            try:
                for event in self._parser.finalize()[1] if piece is None else self._parser.feed(piece):
                    self._follow(event)
            except Exception:  # see __init__
                self._parser = None
                self._turn.is_reasoning = False
                self._give_up_call()
        if self._parser is None:
            for start, text in self._input.rest():
                self._turn.content(start, text)

    def _follow_prompt(self, event: dict[str, Any]) -> None:
        if event["type"] == "region_open":
            self._open(event["field"])
        elif event["type"] == "region_close":
            self._close()

    def _follow(self, event: dict[str, Any]) -> None:
        if event["type"] == "region_open":
            self._open(event["field"])
        elif event["type"] == "region_chunk":
            skipped, text = self._input.find(event["text"])
            if self._field == _CALLS:
                self._pending += skipped + text
                return
            if self._gave_up:  # what closed it is no marker, either
                self._gave_up = False
                text = skipped + text
            for start, part in text:
                (self._turn.reasoning if self._turn.is_reasoning else self._turn.content)(start, part)
        else:
            if self._field == _CALLS and self._call(event["value"]):
                self._pending.clear()
            self._close()

    def _open(self, field: str) -> None:
        self._field = field
        if field in _REASONING:
            self._turn.begin_reasoning()

    def _close(self) -> None:
        self._give_up_call()
        if self._turn.is_reasoning:
            self._turn.end_reasoning()
        self._field = None

    def _call(self, value: Any) -> bool:
        calls = [_name_and_arguments(call) for call in (value if isinstance(value, list) else [value])]
        known = [call for call in calls if call is not None and call[0] in self._turn.tools]
        if not known or len(known) < len(calls):
            return False
        for name, arguments in known:
            self._turn.begin_call(name)
            self._turn.arguments(arguments)
        return True

    def _give_up_call(self) -> None:
        self._gave_up = self._gave_up or bool(self._pending)
        for start, text in self._pending:
            self._turn.content(start, text)
        self._pending.clear()


class _Input:
    """What the parser has been fed and has not told of yet, and where it stands in the input."""

    def __init__(self) -> None:
        self._cut = ""
        self._position = 0
        self._untold: list[tuple[int | None, str]] = []

    def take(self, text: str) -> list[str]:
        """More input, as it is fed: control tokens by their names. Half a control token waits."""
        text = self._cut + text
        end = _NOTHING.undecided(text, 0)
        self._cut = text[end:]
        return self._split(text[:end])

    def take_rest(self) -> list[str]:
        """What has waited."""
        text, self._cut = self._cut, ""
        return self._split(text)

    def find(self, chunk: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Plain text before a chunk, and in it. The parser tells in order and leaves out only what opens and closes."""
        whole = "".join(text for _, text in self._untold)
        start = max(whole.find(chunk), 0)
        return self._told(start), self._told(len(chunk))

    def rest(self) -> list[tuple[int, str]]:
        """All that has not been told of."""
        return self._told(sum(len(text) for _, text in self._untold))

    def _told(self, length: int) -> list[tuple[int, str]]:
        parts: list[tuple[int, str]] = []
        while length and self._untold:
            start, text = self._untold.pop(0)
            if start is not None:
                parts.append((start, text[:length]))
            if length < len(text):
                self._untold.insert(0, (None if start is None else start + length, text[length:]))
            length -= min(length, len(text))
        return parts

    def _split(self, text: str) -> list[str]:
        fed: list[str] = []
        for part in re.split(f"({CONTROL.pattern})", text):
            if not part:
                continue
            is_control = part[0] == CONTROL_BEGIN and part[-1] == CONTROL_END
            fed.append(part[1:-1] if is_control else part)
            self._untold.append((None if is_control else self._position, fed[-1]))
            self._position += len(part)
        return fed


def _name_and_arguments(call: Any) -> tuple[str, str] | None:
    """Of a call, as messages have it. None: it is none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        return None
    arguments = function.get("arguments")
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return (name, json_text(arguments or {})) if isinstance(arguments or {}, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None
