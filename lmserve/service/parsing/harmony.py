"""gpt-oss: messages in channels. ``analysis`` is reasoning, a message to ``functions.f`` a call, all else content.

A message is a header, ``<|message|>``, a body, and ``<|end|>`` or an end token. The header names the channel and,
before or after it, whom the message is for.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass

from lmserve.service.parsing.answers import attempt
from lmserve.service.parsing.family import CallSyntax, Reasoning
from lmserve.service.parsing.json_calls import stream_arguments
from lmserve.service.parsing.reader import Malformed, Steps, Stops
from lmserve.service.parsing.turn import Turn

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
REASONING = Reasoning(f"{CHANNEL}analysis{MESSAGE}", f"{END}{START}assistant")
BEFORE_CONTENT = f"{CHANNEL}final{MESSAGE}"
SYNTAX = CallSyntax(
    before_name=f"{CHANNEL}commentary to=functions.",
    after_name=f" {CONSTRAIN}json{MESSAGE}",
    after_arguments="",
    may_repeat=False,
)
_MAX_HEADER = 512
_ROLE = "assistant"
_TO = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


@dataclass(frozen=True, slots=True)
class _Markers:
    """As they stand in this model's output, by their names."""

    names: dict[str, str]
    in_header: Stops
    after_body: Stops
    between: Stops


def answer(turn: Turn) -> Steps:
    """Read messages to the end. The prompt ends within one: after its role, in its header, or in its body."""
    names = {turn.marker(name): name for name in MARKERS}
    written = {name: marker for marker, name in names.items()}
    markers = _Markers(
        names,
        Stops(names),
        Stops([written[END], written[CALL], written[RETURN], written[START]]),
        Stops([written[START], written[CHANNEL], written[MESSAGE]]),
    )
    _, begun, header = turn.prompt.rpartition(f"{START}{_ROLE}")
    if begun and MESSAGE in header:
        turn.reader.hold()
        yield from attempt(turn, _body(turn, markers, header.partition(MESSAGE)[0]))
    elif begun and (header or (yield from turn.reader.peek()) == " "):  # a header with its channel first: see below
        turn.reader.hold()
        yield from attempt(turn, _message(turn, markers, header))
    while True:
        found = yield from turn.reader.text_until(markers.between, turn.content)
        if found is None:
            return
        if names[found] == START:
            yield from turn.reader.expect(found)
            yield from turn.reader.accept(_ROLE)
        turn.reader.hold()
        yield from attempt(turn, _message(turn, markers, ""))


def _message(turn: Turn, markers: _Markers, begun: str) -> Steps:
    header = yield from _header(turn, markers, begun)
    yield from _body(turn, markers, header)


def _header(turn: Turn, markers: _Markers, begun: str) -> Generator[None, None, str]:
    """Read a header with the marker that ends it: its text, markers by their names. Raises Malformed."""
    parts = [begun]
    length = 0

    def add(_: int, text: str) -> None:
        nonlocal length
        length += len(text)
        if length > _MAX_HEADER:
            raise Malformed
        parts.append(text)

    while True:
        found = yield from turn.reader.text_until(markers.in_header, add)
        name = markers.names[found] if found else None
        if found is None and CHANNEL in "".join(parts):
            turn.reader.drop_hold()  # a header that the output's end has cut off says nothing
        if found is None or name not in (CHANNEL, CONSTRAIN, MESSAGE):
            raise Malformed
        yield from turn.reader.expect(found)
        if name == MESSAGE:
            return "".join(parts)
        add(0, name if name == CHANNEL else " ")


def _body(turn: Turn, markers: _Markers, header: str) -> Steps:
    """Read the body, and the marker after it."""
    recipient = _TO.search(header)
    channel = _CHANNEL_NAME.search(header)
    if recipient is not None:
        name = recipient[1] if recipient[1] in turn.tools else recipient[1].removesuffix("json")
        yield from turn.reader.space()
        yield from stream_arguments(turn, name)
        yield from _end(turn, markers)
        return
    turn.reader.drop_hold()
    if channel is None or channel[1] != "analysis":
        yield from turn.reader.text_until(markers.after_body, turn.content)
        yield from _end(turn, markers)
        return
    turn.begin_reasoning()
    if (yield from turn.reader.text_until(markers.after_body, turn.reasoning)) is not None:
        turn.end_reasoning()
        yield from _end(turn, markers)


def _end(turn: Turn, markers: _Markers) -> Steps:
    """Read what ends a message. The marker that starts another is left."""
    found = yield from turn.reader.text_until(markers.after_body, turn.content)
    if found is not None and markers.names[found] != START:
        yield from turn.reader.expect(found)
