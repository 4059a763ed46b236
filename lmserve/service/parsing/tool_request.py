"""``[TOOL_REQUEST]`` around a JSON object: what models are asked to write whose templates know no tools.

Also what is enforced on families whose own calls carry no JSON, so their parsers read it, too.
"""

from __future__ import annotations

from lmserve.service.parsing.answers import Openings, read_close
from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.json_calls import read_call
from lmserve.service.parsing.reader import Steps
from lmserve.service.parsing.turn import Turn

OPEN, CLOSE = "[TOOL_REQUEST]", "[END_TOOL_REQUEST]"
MARKERS = (OPEN, CLOSE)
SYNTAX = CallSyntax(
    before_name=f'{OPEN}{{"name": "',
    after_name='", "arguments": ',
    after_arguments=f"}}{CLOSE}",
    separator="\n",
)


def openings(turn: Turn) -> Openings:
    """What this family's calls begin with."""
    return {turn.marker(OPEN): read_block}


def read_block(turn: Turn) -> Steps:
    """Read on behind the opening marker. The output may end before the closing one."""
    yield from turn.reader.space()
    yield from read_call(turn)
    yield from read_close(turn, turn.marker(CLOSE))
