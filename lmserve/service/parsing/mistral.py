"""Mistral: ``[TOOL_CALLS]`` before a JSON array (v3, v7) or before name and arguments of each call (v11, v13)."""

from __future__ import annotations

from lmserve.service.parsing.answers import Openings
from lmserve.service.parsing.family import CallSyntax, Reasoning
from lmserve.service.parsing.json_calls import read_calls, stream_arguments
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.turn import Turn

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
THINK = Reasoning("[THINK]", "[/THINK]")
MARKERS = (OPEN, CALL_ID, ARGS)
ARRAY_SYNTAX = CallSyntax(
    begin=f"{OPEN}[",
    before_name='{"name": "',
    after_name='", "arguments": ',
    after_arguments="}",
    separator=", ",
    end="]",
)
NAMED_SYNTAX = CallSyntax(before_name=OPEN, after_name=ARGS, after_arguments="")


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): _read_calls}


def _read_calls(turn: Turn) -> Steps:
    yield from turn.reader.space()
    following = yield from turn.reader.peek()
    if following in ("[", "{"):
        yield from read_calls(turn)
        return
    name = yield from turn.reader.word()
    yield from turn.reader.space()
    if (yield from turn.reader.accept(turn.marker(CALL_ID))) is not None:
        yield from turn.reader.word()
        yield from turn.reader.space()
    yield from turn.reader.accept(turn.marker(ARGS))
    yield from turn.reader.space()
    yield from stream_arguments(turn, name)
