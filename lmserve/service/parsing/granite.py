"""Granite 3: ``<|tool_call|>`` before a JSON array of calls; reasoning between phrases, or with a marked response."""

from __future__ import annotations

from collections.abc import Generator

from lmserve.service.parsing.answers import Openings
from lmserve.service.parsing.family import CallSyntax, Reasoning
from lmserve.service.parsing.hermes import OPEN as PLAIN_OPEN
from lmserve.service.parsing.json_calls import read_calls
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.turn import Turn

OPEN = "<|tool_call|>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
PHRASES = Reasoning("Here is my thought process:", "Here is my response:")
MARKERS = (OPEN, PLAIN_OPEN, RESPONSE, END_RESPONSE)
SYNTAX = CallSyntax(
    begin=f"{OPEN}[",
    before_name='{"name": "',
    after_name='", "arguments": ',
    after_arguments="}",
    separator=", ",
    end="]",
)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): _read_block, turn.marker(PLAIN_OPEN): _read_block}


def read_response_marker(turn: Turn) -> Generator[None, None, bool]:
    """Read the marker before the response, if there is one."""
    turn.reader.hold()
    yield from turn.reader.space()
    if (yield from turn.reader.accept(turn.marker(RESPONSE))) is None:
        turn.release()
        return False
    turn.reader.drop_hold()
    turn.end_reasoning()
    return True


def response_end(turn: Turn) -> Openings:
    """The marker behind the response, which opens nothing."""
    return {turn.marker(END_RESPONSE): _nothing}


def _nothing(_: Turn) -> Steps:
    yield from ()


def _read_block(turn: Turn) -> Steps:
    yield from turn.reader.space()
    yield from read_calls(turn)
