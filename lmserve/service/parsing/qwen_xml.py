"""Qwen3-Coder, Qwen 3.5, Granite 4.2: ``<tool_call><function=f><parameter=k>`` with values as plain text.

Models leave out the outer ``<tool_call>``, ``</parameter>`` (a value then ends where the next thing begins) and
``</function>``.
"""

from __future__ import annotations

from functools import partial

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.hermes import CLOSE, OPEN, read_block
from lmserve.service.parsing.parameters import ParameterWriter
from lmserve.service.parsing.reader import Steps, Stops
from lmserve.service.parsing.turn import Turn

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
WRAPPERS = {OPEN: CLOSE, "<seed:tool_call>": "</seed:tool_call>"}
MARKERS = tuple(marker for pair in WRAPPERS.items() for marker in pair)
_KEY_ENDS = Stops([">"])
_VALUE_ENDS = Stops([END_PARAMETER, PARAMETER, END_FUNCTION])


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    wrapped = {turn.marker(begin): partial(_read_wrapped, turn.marker(end)) for begin, end in WRAPPERS.items()}
    return {**wrapped, FUNCTION: _read_function}


def _read_wrapped(close: str, turn: Turn) -> Steps:
    yield from _read_block(turn, close)
    while (yield from read_close(turn, close, FUNCTION, keep=FUNCTION)) == FUNCTION:
        yield from _read_function(turn, close)


def _read_block(turn: Turn, close: str) -> Steps:
    yield from turn.reader.space()
    following = yield from turn.reader.peek()
    if following != "<":
        yield from read_block(turn)  # some write JSON after all
        return
    yield from turn.reader.expect(FUNCTION)
    yield from _read_function(turn, close)


def _read_function(turn: Turn, *close: str) -> Steps:
    """Read on behind ``<function=``. ``close``: the marker around it, if there is one, ends it, too."""
    name = yield from turn.reader.word()
    tool = turn.tool(name)
    yield from turn.reader.expect(">")
    yield from turn.reader.space()
    found = yield from turn.reader.expect(PARAMETER, END_FUNCTION, *close)
    writer = ParameterWriter(turn, tool)
    while found == PARAMETER:
        key = yield from turn.reader.collect_until(_KEY_ENDS)
        yield from turn.reader.expect(">")
        value = yield from turn.reader.collect_until(_VALUE_ENDS)
        writer.write(key, _unwrapped(value))
        yield from turn.reader.accept(END_PARAMETER)
        yield from turn.reader.space()
        found = yield from turn.reader.expect(PARAMETER, END_FUNCTION, *close)
    writer.close()


def _unwrapped(value: str) -> str:
    """Without the one line end on each side that the format puts there."""
    return value.removeprefix("\n").removesuffix("\n")
