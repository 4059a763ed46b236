"""DeepSeek: V3 and R1 write a name and fenced JSON, V3.1 the name and the JSON alone, all between markers."""

from __future__ import annotations

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.json_calls import stream_arguments
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.turn import Turn

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKERS = (CALLS, END_CALLS, CALL, SEP, END_CALL)
FENCED_SYNTAX = CallSyntax(
    begin=CALLS,
    before_name=f"{CALL}function{SEP}",
    after_name="\n```json\n",
    after_arguments=f"\n```{END_CALL}",
    separator="\n",
    end=END_CALLS,
)
PLAIN_SYNTAX = CallSyntax(
    begin=CALLS, before_name=CALL, after_name=SEP, after_arguments=END_CALL, separator="", end=END_CALLS
)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(CALLS): _read_calls, turn.marker(CALL): _read_call}


def _read_calls(turn: Turn) -> Steps:
    call, end = turn.marker(CALL), turn.marker(END_CALLS)
    yield from turn.reader.space()
    yield from turn.reader.expect(call)
    while True:
        yield from _read_call(turn)
        turn.reader.hold()
        yield from turn.reader.space()
        if (yield from turn.reader.expect(call, end)) == end:
            return


def _read_call(turn: Turn) -> Steps:
    """Read on behind the marker that begins a call."""
    yield from turn.reader.space()
    name = yield from turn.reader.word()
    yield from turn.reader.space()
    yield from turn.reader.expect(turn.marker(SEP))
    yield from turn.reader.space()
    if (yield from turn.reader.peek()) != "{":
        name = yield from turn.reader.word()  # what stood before was its kind
        yield from turn.reader.space()
        yield from turn.reader.accept("```json")
        yield from turn.reader.space()
    yield from stream_arguments(turn, name)
    yield from read_close(turn, "```")
    yield from read_close(turn, turn.marker(END_CALL))
