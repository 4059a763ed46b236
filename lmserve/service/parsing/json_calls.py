"""Calls as JSON objects: ``{"name": …, "arguments": {…}}``."""

from __future__ import annotations

import json
from collections.abc import Generator

from lmserve.service.parsing.reader import Malformed, Steps
from lmserve.service.parsing.turn import Turn

_NAME = "name"
_ARGUMENTS = ("arguments", "parameters")


def stream_arguments(turn: Turn, name: str) -> Steps:
    """Read a JSON object, the arguments of a call of this tool, and pass it on as it comes.

    The call begins once the object has begun as one does. Raises Malformed.
    """
    turn.tool(name)
    yield from turn.reader.expect("{")
    space = yield from turn.reader.space()
    following = yield from turn.reader.peek()
    if following not in ('"', "}"):
        raise Malformed
    turn.begin_call(name)
    turn.arguments("{" + space)
    yield from turn.reader.json_rest("}", turn.pass_arguments)


def read_call(turn: Turn, *, bare: bool = False) -> Steps:
    """Read one call as an object, its keys in any order. Raises Malformed.

    ``bare``: nothing but the object says that it is a call, so one without arguments may have no other keys either.
    """
    name: str | None = None
    arguments: str | None = None
    begun = strange = False
    yield from turn.reader.expect("{")
    while True:
        yield from turn.reader.space()
        key = yield from turn.reader.json_string()
        yield from turn.reader.space()
        yield from turn.reader.expect(":")
        yield from turn.reader.space()
        if key == _NAME and name is None:
            name = yield from turn.reader.json_string()
            turn.tool(name)
        elif key in _ARGUMENTS and not begun and arguments is None:
            following = yield from turn.reader.peek()
            if following == "{" and name is not None:
                begun = True
                yield from stream_arguments(turn, name)
            else:
                arguments = yield from _held_arguments(turn, following)
        else:
            strange = strange or key != "type"
            yield from turn.reader.json_value(_nowhere)
        if name is not None and arguments is not None and not begun:
            begun = True
            turn.begin_call(name)
            turn.arguments(arguments)
        yield from turn.reader.space()
        if (yield from turn.reader.expect(",", "}")) == "}":
            break
    if begun:
        return
    if name is None or (bare and strange):
        raise Malformed
    turn.begin_call(name)
    turn.arguments("{}")


def read_calls(turn: Turn) -> Steps:
    """Read an array of calls, or one call alone. Raises Malformed."""
    if (yield from turn.reader.peek()) == "{":
        yield from read_call(turn)
        return
    yield from turn.reader.expect("[")
    while True:
        yield from turn.reader.space()
        yield from read_call(turn)
        yield from turn.reader.space()
        turn.reader.hold()
        if (yield from turn.reader.expect(",", "]")) == "]":
            turn.reader.drop_hold()
            return


def _held_arguments(turn: Turn, following: str) -> Generator[None, None, str]:
    """Arguments that cannot be passed on as they come: the text of an object."""
    if following == '"':
        text = (yield from turn.reader.json_string()).strip()
    else:
        parts: list[str] = []
        yield from turn.reader.json_value(lambda _, part: parts.append(part))
        text = "".join(parts)
    if text in ("", "null"):
        return "{}"
    try:
        text.encode()  # fails where the string had half of a surrogate pair
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        raise Malformed from None
    if not is_object:
        raise Malformed
    return text


def _nowhere(start: int, text: str) -> None:
    """For what is read and not needed."""
