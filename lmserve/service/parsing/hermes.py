"""Hermes, Qwen 2.5 and 3, Granite 4: ``<tool_call>`` around a JSON object, one block for each call."""

from __future__ import annotations

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.json_calls import read_calls
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.turn import Turn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKERS = (OPEN, CLOSE)
SYNTAX = CallSyntax(
    before_name=f'{OPEN}\n{{"name": "',
    after_name='", "arguments": ',
    after_arguments=f"}}\n{CLOSE}",
    separator="\n",
)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): read_block}


def read_block(turn: Turn) -> Steps:
    """Read on behind the opening marker. The output may end before the closing one."""
    yield from turn.reader.space()
    yield from read_calls(turn)
    yield from read_close(turn, turn.marker(CLOSE))
