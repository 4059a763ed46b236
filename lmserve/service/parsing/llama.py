"""Llama 3: the whole answer is a call, ``{"name": …, "parameters": {…}}`` or a list of Python calls.

Nothing but its place says that it is one, so it has to stand at the start and name one of the tools.
"""

from __future__ import annotations

from lmserve.service.parsing import tool_request
from lmserve.service.parsing.answers import Openings, attempt, read_close
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.json_calls import read_call, stream_arguments
from lmserve.service.parsing.pythonic import read_arguments, read_list
from lmserve.service.parsing.reader import Malformed, Steps
from lmserve.service.parsing.turn import Turn

TAG = "<|python_tag|>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
MARKERS = (TAG,)
SYNTAX = CallSyntax(before_name='{"name": "', after_name='", "parameters": ', after_arguments="}", may_repeat=False)
_BUILT_IN = ".call"


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {FUNCTION: _read_function, turn.marker(TAG): _read_tagged}


def read_whole(turn: Turn) -> Steps:
    """Read the answer as calls, if it begins as one. Otherwise it is left to be read as text."""
    turn.reader.hold()
    yield from attempt(turn, _read_start(turn))


def _read_start(turn: Turn) -> Steps:
    yield from turn.reader.space()
    if (yield from turn.reader.accept(turn.marker(tool_request.OPEN))) is not None:
        yield from tool_request.read_block(turn)
        return
    following = yield from turn.reader.peek()
    if following not in ("{", "["):
        raise Malformed
    yield from (_read_objects(turn) if following == "{" else read_list(turn))


def _read_objects(turn: Turn) -> Steps:
    while True:
        yield from read_call(turn, bare=True)
        turn.reader.hold()
        yield from turn.reader.space()
        yield from turn.reader.expect(";")
        yield from turn.reader.space()


def _read_tagged(turn: Turn) -> Steps:
    yield from turn.reader.space()
    following = yield from turn.reader.peek()
    if following in ("{", "["):
        yield from _read_start(turn)
        return
    name = (yield from turn.reader.word()).removesuffix(_BUILT_IN)
    yield from read_arguments(turn, name)


def _read_function(turn: Turn) -> Steps:
    name = yield from turn.reader.word()
    yield from turn.reader.expect(">")
    yield from turn.reader.space()
    yield from stream_arguments(turn, name)
    yield from read_close(turn, END_FUNCTION)
