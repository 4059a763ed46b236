"""What a parser makes of an output, piece by piece, and what every parser can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CONTROL_BEGIN = "\ufdd0"
CONTROL_END = "\ufdd1"
"""Around the name of a control token in a parser's input, so that text which merely spells the name is no marker.

Unicode's noncharacters, which no text may hold.
"""


def control(name: str) -> str:
    """A control token as it stands in a parser's input."""
    return f"{CONTROL_BEGIN}{name}{CONTROL_END}"


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """More of what the model says."""

    text: str
    start: int
    """Where it begins in the parser's input, in characters. It stands there as is: ``input[start:start+len(text)]``."""


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The model calls a tool, whose name is known to be one of the request's."""

    index: int
    """Of the calls in this answer: 0, 1, …"""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, as JSON text. Together they are one object, if the model wrote one."""

    index: int
    text: str


Event = ReasoningText | ContentText | CallBegin | CallArguments


class OutputParser(Protocol):
    """Of one choice. The events are the same, but for how texts are cut, however the input is cut."""

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as it is known."""
        ...

    def push(self, text: str) -> Sequence[Event]:
        """What is decided now."""
        ...

    def finish(self) -> Sequence[Event]:
        """The output has ended: what was held back is decided. Nothing may be pushed any more."""
        ...
