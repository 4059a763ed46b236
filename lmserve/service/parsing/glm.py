"""GLM 4.5 to 5: ``<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>``, with or without line ends.

Strings are written as they are, blanks at their ends included; other values as JSON.
"""

from __future__ import annotations

from collections.abc import Generator

from lmserve.service.parsing.answers import Openings
from lmserve.service.parsing.hermes import CLOSE, OPEN
from lmserve.service.parsing.parameters import ParameterWriter
from lmserve.service.parsing.reader import Steps, Stops
from lmserve.service.parsing.turn import Turn

KEY, END_KEY, VALUE, END_VALUE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
MARKERS = (OPEN, CLOSE, KEY, END_KEY, VALUE, END_VALUE)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): _read_block}


def _read_block(turn: Turn) -> Steps:
    key_begin, key_end, value_begin, value_end, close = map(turn.marker, (KEY, END_KEY, VALUE, END_VALUE, CLOSE))
    yield from turn.reader.space()
    name = yield from turn.reader.word()
    tool = turn.tool(name)
    yield from _gap(turn)
    found = yield from turn.reader.expect(key_begin, close)
    writer = ParameterWriter(turn, tool)
    while found == key_begin:
        key = yield from _text(turn, key_end)
        yield from _gap(turn)
        yield from turn.reader.expect(value_begin)
        value = yield from _text(turn, value_end)
        writer.write(key.strip(), value)
        yield from _gap(turn)
        found = yield from turn.reader.expect(key_begin, close)
    writer.close()


def _gap(turn: Turn) -> Steps:
    """Read what may stand between: line ends, also where the model has spelt them."""
    yield from turn.reader.space()
    while (yield from turn.reader.accept("\\n")) is not None:
        yield from turn.reader.space()


def _text(turn: Turn, end: str) -> Generator[None, None, str]:
    text = yield from turn.reader.collect_until(Stops([end]))
    yield from turn.reader.expect(end)
    return text
