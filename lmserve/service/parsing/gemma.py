"""Gemma 4 and FunctionGemma: ``call:f{key:value}`` between markers, keys without quotes, strings between a marker.

Gemma 4 thinks in channels, which may stand anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.events import CONTROL_BEGIN
from lmserve.service.parsing.family import Reasoning
from lmserve.service.parsing.reader import Malformed, Steps, Stops
from lmserve.service.parsing.turn import Turn
from lmserve.service.parsing.typed_values import parameter_types, typed_json

CHANNEL, END_CHANNEL = "<|channel>", "<channel|>"
THOUGHT = Reasoning(f"{CHANNEL}thought\n", END_CHANNEL)
_MAX_DEPTH = 32
_KEY = re.compile(f"[^:{{}}\\[\\]{CONTROL_BEGIN}]*")
_SCALAR = re.compile(f"[^,{{}}\\[\\]{CONTROL_BEGIN}]*")


@dataclass(frozen=True, slots=True)
class Style:
    """The markers of one way of writing it."""

    open: str
    close: str
    quote: str


GEMMA_4 = Style("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = Style("<start_function_call>", "<end_function_call>", "<escape>")
MARKERS = (GEMMA_4.open, GEMMA_4.close, GEMMA_4.quote, CHANNEL, END_CHANNEL)
FUNCTION_MARKERS = (FUNCTION_GEMMA.open, FUNCTION_GEMMA.close, FUNCTION_GEMMA.quote)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(GEMMA_4.open): lambda turn: _read_block(turn, GEMMA_4)}


def function_openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(FUNCTION_GEMMA.open): lambda turn: _read_block(turn, FUNCTION_GEMMA)}


def read_channel(turn: Turn) -> Steps:
    """Read on behind the marker that begins a channel."""
    yield from turn.reader.expect("thought")
    yield from turn.reader.space()
    turn.reader.drop_hold()
    turn.begin_reasoning()
    yield from _read_thought(turn)


def read_begun_thought(turn: Turn) -> Steps:
    """Read the thought that the prompt has begun, if it has."""
    if turn.prompt.rstrip().endswith(THOUGHT.begin.rstrip()):
        turn.begin_reasoning()
        yield from _read_thought(turn)


def _read_thought(turn: Turn) -> Steps:
    found = yield from turn.reader.text_until(Stops([turn.marker(END_CHANNEL)]), turn.reasoning)
    if found is not None:
        yield from turn.reader.expect(found)
        turn.end_reasoning()


def _read_block(turn: Turn, style: Style) -> Steps:
    yield from turn.reader.space()
    yield from turn.reader.expect("call:")
    name = yield from turn.reader.word()
    tool = turn.tool(name)
    yield from turn.reader.expect("{")
    turn.begin_call(name)
    turn.arguments("{")
    values = _Values(turn, turn.marker(style.quote))
    yield from values.members(lambda key: parameter_types(tool, key), 1)
    yield from read_close(turn, turn.marker(style.close))


class _Values:
    """Writes the arguments of one call as JSON, as they come."""

    def __init__(self, turn: Turn, quote: str) -> None:
        self._turn = turn
        self._reader = turn.reader
        self._quote = quote
        self._end = Stops([quote])

    def members(self, types_of: Callable[[str], frozenset[str]], depth: int) -> Steps:
        """Read on behind an opening brace, up to its closing one."""
        yield from self._reader.space()
        if (yield from self._reader.accept("}")) is not None:
            self._turn.arguments("}")
            return
        while True:
            key = yield from self._key()
            self._turn.arguments(f"{json.dumps(key, ensure_ascii=False)}: ")
            yield from self._value(types_of(key), depth)
            if (yield from self._reader.expect(",", "}")) == "}":
                self._turn.arguments("}")
                return
            self._turn.arguments(", ")
            yield from self._reader.space()

    def _items(self, depth: int) -> Steps:
        yield from self._reader.space()
        if (yield from self._reader.accept("]")) is not None:
            self._turn.arguments("]")
            return
        while True:
            yield from self._value(frozenset(), depth)
            if (yield from self._reader.expect(",", "]")) == "]":
                self._turn.arguments("]")
                return
            self._turn.arguments(", ")

    def _value(self, types: frozenset[str], depth: int) -> Steps:
        if depth > _MAX_DEPTH:
            raise Malformed
        yield from self._reader.space()
        found = yield from self._reader.accept(self._quote, "{", "[")
        if found == self._quote:
            self._turn.arguments('"')
            yield from self._string()
            self._turn.arguments('"')
        elif found == "{":
            self._turn.arguments("{")
            yield from self.members(lambda _: frozenset(), depth + 1)
        elif found == "[":
            self._turn.arguments("[")
            yield from self._items(depth + 1)
        else:
            parts: list[str] = []
            yield from self._reader.run(_SCALAR, lambda _, text: parts.append(text))
            if (yield from self._reader.peek()) not in (",", "}", "]"):
                raise Malformed
            self._turn.arguments(typed_json("".join(parts).strip(), types))
        yield from self._reader.space()

    def _string(self) -> Steps:
        def write(_: int, text: str) -> None:
            self._turn.arguments(json.dumps(text, ensure_ascii=False)[1:-1])

        if (yield from self._reader.text_until(self._end, write)) is None:
            raise Malformed
        yield from self._reader.expect(self._quote)

    def _key(self) -> Generator[None, None, str]:
        if (yield from self._reader.accept(self._quote)) is not None:
            key = yield from self._reader.collect_until(self._end)
            yield from self._reader.expect(self._quote)
        else:
            parts: list[str] = []
            yield from self._reader.run(_KEY, lambda _, text: parts.append(text))
            key = "".join(parts).strip()
        yield from self._reader.expect(":")
        return key
