"""Llama 3.2 and 4: a list of Python calls, ``[f(a=1, b="x"), g()]``. Its values are literals; nothing is run."""

from __future__ import annotations

import ast
import re
import warnings

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.events import CONTROL_BEGIN
from lmserve.service.parsing.reader import Malformed, Reader, Sink, Steps
from lmserve.service.parsing.turn import Turn
from lmserve.service.parsing.typed_values import json_text

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
MARKERS = (OPEN, CLOSE)
_CODE = re.compile(f"[^\"'()\\[\\]{{}}{CONTROL_BEGIN}]*")
_IN_QUOTES = {quote: re.compile(f"[^{quote}\\\\{CONTROL_BEGIN}]*") for quote in ("'", '"')}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): _read_marked}


def read_list(turn: Turn) -> Steps:
    """Read a list of calls, each of which is passed on whole. Raises Malformed."""
    yield from turn.reader.expect("[")
    while True:
        yield from turn.reader.space()
        name = yield from turn.reader.word()
        yield from read_arguments(turn, name)
        turn.reader.hold()
        yield from turn.reader.space()
        if (yield from turn.reader.expect(",", "]")) == "]":
            turn.reader.drop_hold()
            return


def read_arguments(turn: Turn, name: str) -> Steps:
    """Read the parenthesis behind a function's name. Raises Malformed."""
    turn.tool(name)
    yield from turn.reader.expect("(")
    parts: list[str] = []
    yield from _rest(turn.reader, ")", lambda _, text: parts.append(text))
    arguments = _as_json("".join(parts)[:-1])
    turn.begin_call(name)
    turn.arguments(arguments)


def _read_marked(turn: Turn) -> Steps:
    yield from turn.reader.space()
    yield from read_list(turn)
    yield from read_close(turn, turn.marker(CLOSE))


def _rest(reader: Reader, closing: str, sink: Sink) -> Steps:
    """Pass on code up to this closing bracket, which belongs to it."""
    open_ = [closing]
    while open_:
        yield from reader.run(_CODE, sink)
        following = yield from reader.peek()
        if following in _IN_QUOTES:
            yield from reader.quoted(following, _IN_QUOTES[following], sink)
            continue
        if following in _CLOSING:
            open_.append(_CLOSING[following])
        elif following != open_.pop():
            raise Malformed
        yield from reader.one(sink)


def _as_json(code: str) -> str:
    """Keyword arguments, as JSON. Raises Malformed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in strings, which are the model's affair
        try:
            call = ast.parse(f"_({code}\n)", mode="eval").body
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                raise Malformed
            values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            if None in values or len(values) < len(call.keywords):
                raise Malformed
            return json_text(values)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise Malformed from None
