"""What the answers of most families are made of: reasoning first, then text with calls in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

from lmserve.service.parsing.family import Reasoning
from lmserve.service.parsing.reader import Malformed, Steps, Stops
from lmserve.service.parsing.turn import Turn

Openings = Mapping[str, Callable[[Turn], Steps]]
"""Markers, as they stand in the output, and what reads on behind each. It raises Malformed where no call comes."""


def read_reasoning(turn: Turn, ways: Sequence[Reasoning]) -> Steps:
    """Reasoning, which stands at the start of the output or not at all, unless the prompt's end has begun it."""
    ends = {turn.marker(way.begin): turn.marker(way.end) for way in ways}
    begun = [way for way in ways if turn.prompt.rstrip().endswith(way.begin.rstrip())]
    if begun:
        turn.begin_reasoning()
        yield from turn.reader.space()
        yield from turn.reader.accept(turn.marker(begun[0].begin))  # some models write it once more
        end = turn.marker(begun[0].end)
    elif ends:
        turn.reader.hold()
        yield from turn.reader.space()
        begin = yield from turn.reader.accept(*ends)
        if begin is None:
            turn.release()
            return
        turn.reader.drop_hold()
        turn.begin_reasoning()
        end = ends[begin]
    else:
        return
    found = yield from turn.reader.text_until(Stops([end]), turn.reasoning)
    if found is not None:
        yield from turn.reader.expect(found)
        turn.end_reasoning()


def read_text_and_calls(turn: Turn, openings: Openings) -> Steps:
    """Text, in which calls may stand anywhere, to the end."""
    stops = Stops(openings)
    while True:
        found = yield from turn.reader.text_until(stops, turn.content)
        if found is None:
            return
        turn.reader.hold()
        yield from turn.reader.expect(found)
        yield from attempt(turn, openings[found](turn))


def read_close(turn: Turn, *markers: str, keep: str | None = None) -> Generator[None, None, str | None]:
    """Read the marker behind a call, with the blanks before it. None: another text follows, and nothing is read.

    The output's end may have cut it off. What has been read stays held behind the marker ``keep``, which opens more.
    """
    turn.reader.hold()
    yield from turn.reader.space()
    found = yield from turn.reader.accept(*markers, cut_off=True)
    if found is None:
        turn.release()
    elif found != keep:
        turn.reader.drop_hold()
    return found


def attempt(turn: Turn, call: Steps) -> Steps:
    """Read what may be a call. What is held, if it is none, becomes content."""
    try:
        yield from call
    except Malformed:
        turn.release()
    turn.reader.drop_hold()
