"""One choice's output on its way through a parser: what is read, and what is made of it.

The one rule about blanks and line ends, for all families: those around reasoning are dropped, on both sides of its
markers, and so are those between a call and what stands before it, another call, or the output's end. All others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from lmserve.service.parsing.events import (
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    ReasoningText,
    control,
)
from lmserve.service.parsing.family import ParserInput
from lmserve.service.parsing.reader import CONTROL, Malformed, Reader, Steps, Stops
from lmserve.service.tools import Tool

BLANKS = " \t\r\n"


class Turn:
    """Makes events of what a parser reads from ``reader``."""

    def __init__(self, given: ParserInput) -> None:
        self.reader = Reader()
        self.prompt = given.prompt
        self.tools: dict[str, Tool] = {tool.name: tool for tool in given.tools}
        self.is_reasoning = False
        self._is_control = given.is_control
        self._events: list[Event] = []
        self._num_calls = 0
        self._blanks: list[tuple[int, str]] = []
        self._after_call = False
        self._after_reasoning = False
        self._fresh_thought = True
        self._thought_before = False

    def marker(self, name: str) -> str:
        """A marker as it stands in this model's output."""
        return control(name) if self._is_control(name) else name

    def content(self, start: int, text: str) -> None:
        """What the model says. Blanks at its end wait for what follows."""
        if self._after_reasoning:
            start += len(text) - len(text.lstrip(BLANKS))
            text = text.lstrip(BLANKS)
        body = text.rstrip(BLANKS)
        if body:
            self._release_blanks()
            self._events.append(ContentText(body, start))
            self._after_call = self._after_reasoning = False
        if len(text) > len(body):
            self._blanks.append((start + len(body), text[len(body) :]))

    def begin_reasoning(self) -> None:
        """What follows is thought."""
        self.is_reasoning = True
        self._blanks.clear()
        self._fresh_thought = True

    def reasoning(self, start: int, text: str) -> None:
        """What the model thinks. Blanks at its end wait for what follows."""
        if self._fresh_thought:
            text = text.lstrip(BLANKS)
        body = text.rstrip(BLANKS)
        if body:
            parts = ["\n"] if self._fresh_thought and self._thought_before else []
            parts += [blank for _, blank in self._blanks]
            self._events.append(ReasoningText("".join([*parts, body])))
            self._blanks.clear()
            self._fresh_thought = False
            self._thought_before = True
        if len(text) > len(body):
            self._blanks.append((start, text[len(body) :]))

    def end_reasoning(self) -> None:
        """The thought has come to its end marker."""
        self.is_reasoning = False
        self._blanks.clear()
        self._after_reasoning = True

    def tool(self, name: str) -> Tool:
        """The tool of that name. Raises Malformed where the request has none."""
        if name not in self.tools:
            raise Malformed
        return self.tools[name]

    def begin_call(self, name: str) -> None:
        """The model calls this tool: what is held was its opening."""
        self.reader.drop_hold()
        self._blanks.clear()
        self._after_call, self._after_reasoning = True, False
        self._events.append(CallBegin(self._num_calls, name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that was begun last."""
        self._events.append(CallArguments(self._num_calls - 1, text))

    def pass_arguments(self, _: int, text: str) -> None:
        """As ``arguments``, where a reader passes text on."""
        self.arguments(text)

    def release(self) -> None:
        """What is held is no call: it is content, as it was written, but for control tokens."""
        for start, text in self.reader.take_held():
            if not CONTROL.fullmatch(text):
                self.content(start, text)

    def finish(self) -> None:
        """The output has ended."""
        if self.is_reasoning and not self._fresh_thought:
            self._events += [ReasoningText(blank) for _, blank in self._blanks]
        elif not self.is_reasoning and not self._after_call and not self._after_reasoning:
            self._release_blanks()

    def drain(self) -> Sequence[Event]:
        """The events since the last time, neighbours of one kind in one."""
        events, self._events = self._events, []
        return [_join(list(group)) for _, group in groupby(events, key=_Joints())]

    def _release_blanks(self) -> None:
        self._events += [ContentText(text, start) for start, text in self._blanks]
        self._blanks.clear()


class _Joints:
    """Numbers the runs of events that are one text."""

    def __init__(self) -> None:
        self._run = 0
        self._last: Event | None = None

    def __call__(self, event: Event) -> int:
        if not self._continues(event):
            self._run += 1
        self._last = event
        return self._run

    def _continues(self, event: Event) -> bool:
        match self._last, event:
            case ReasoningText(), ReasoningText():
                return True
            case ContentText(text, start), ContentText():
                return event.start == start + len(text)
            case CallArguments(index, _), CallArguments():
                return event.index == index
        return False


def _join(run: list[Event]) -> Event:
    first = run[0]
    if len(run) == 1 or isinstance(first, CallBegin):
        return first
    text = "".join(event.text for event in run if not isinstance(event, CallBegin))
    if isinstance(first, ContentText):
        return ContentText(text, first.start)
    return CallArguments(first.index, text) if isinstance(first, CallArguments) else ReasoningText(text)


Answer = Callable[[Turn], Steps]
"""Reads one output to its end."""
_NOTHING = Stops(())


class GeneratorParser:
    """An ``OutputParser`` of an ``Answer``: runs it as far as the output has come."""

    def __init__(self, given: ParserInput, answer: Answer) -> None:
        self._turn = Turn(given)
        self._steps = _to_the_end(self._turn, answer)
        next(self._steps, None)

    @property
    def is_reasoning(self) -> bool:
        return self._turn.is_reasoning

    def push(self, text: str) -> Sequence[Event]:
        self._turn.reader.push(text)
        next(self._steps, None)
        return self._turn.drain()

    def finish(self) -> Sequence[Event]:
        self._turn.reader.end()
        next(self._steps, None)
        self._turn.finish()
        return self._turn.drain()


def _to_the_end(turn: Turn, answer: Answer) -> Steps:
    """Whatever the answer leaves unread is content."""
    try:
        yield from answer(turn)
    except Malformed:
        turn.release()
    yield from turn.reader.text_until(_NOTHING, turn.content)
