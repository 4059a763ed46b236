"""Outputs for the tests of parsers: kept ones, and how they are replayed and folded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmserve.service.parsing.events import CallArguments, CallBegin, ContentText, Event, ReasoningText, control
from lmserve.service.parsing.family import Family, ParserInput
from lmserve.service.parsing.table import FAMILIES, REASONINGS
from lmserve.service.tools import Tool

FOLDER = Path(__file__).parent / "transcripts"
BY_NAME: dict[str, Family] = {line.name: line.family(() if line.reasoning else REASONINGS) for line in FAMILIES}


@dataclass(frozen=True)
class Folded:
    """All of an answer's events, joined."""

    reasoning: str | None
    content: str | None
    calls: list[tuple[str, str]]


@dataclass(frozen=True)
class Transcript:
    """One output, and what it says."""

    family: str
    given: ParserInput
    text: str
    expected: Folded


def tool(name: str, parameters: dict[str, Any]) -> Tool:
    return Tool(name=name, description="", parameters=parameters)


def read_transcript(path: Path) -> Transcript:
    data = json.loads(path.read_text(encoding="utf-8"))
    pieces = data["pieces"]
    controls = {piece["control"] for piece in pieces if "control" in piece} | set(data.get("controls", ()))
    return Transcript(
        family=data["family"],
        given=ParserInput(
            prompt=data["prompt_end"],
            tools=[tool(each["name"], each["parameters"]) for each in data["tools"]],
            is_control=controls.__contains__,
        ),
        text="".join(control(piece["control"]) if "control" in piece else piece["text"] for piece in pieces),
        expected=Folded(
            data["reasoning"], data["content"], [(call["name"], call["arguments"]) for call in data["calls"]]
        ),
    )


def replay(family: Family, given: ParserInput, pieces: Iterable[str]) -> list[Event]:
    parser = family.make_parser(given)
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
    return [*events, *parser.finish()]


def fold(events: Sequence[Event]) -> Folded:
    """Also holds calls to the order that clients need."""
    reasoning = [event.text for event in events if isinstance(event, ReasoningText)]
    content = [event.text for event in events if isinstance(event, ContentText)]
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            assert event.text
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return Folded("".join(reasoning) or None, "".join(content) or None, calls)
