"""What is told when: nothing is held back that is decided."""

from __future__ import annotations

from lmserve.service.parsing.events import CallArguments, CallBegin, ContentText, Event, ReasoningText
from lmserve.service.parsing.family import ParserInput
from tests.service.parsing.replay import BY_NAME, tool

TOOLS = [tool("add", {})]


def told(family: str, *pieces: str) -> list[list[Event]]:
    parser = BY_NAME[family].make_parser(ParserInput("", TOOLS, lambda _: False))
    return [*(list(parser.push(piece)) for piece in pieces), list(parser.finish())]


def test_text_is_told_at_once_but_for_what_may_become_a_marker_or_be_dropped() -> None:
    assert told("hermes", "One", " two <", "3", " ") == [
        [ContentText("One", 0)],
        [ContentText(" two", 3)],
        [ContentText(" <3", 7)],
        [],
        [ContentText(" ", 10)],
    ]


def test_a_call_is_told_when_its_arguments_begin_and_they_as_they_come() -> None:
    assert told(
        "hermes", "Hi\n<tool_call>", '{"name": "add", ', '"arguments": {', '"n"', ": 1", "}}", "</tool_call>"
    ) == [
        [ContentText("Hi", 0)],
        [],
        [],
        [CallBegin(0, "add"), CallArguments(0, '{"n"')],
        [CallArguments(0, ": 1")],
        [CallArguments(0, "}")],
        [],
        [],
    ]


def test_reasoning_is_told_as_it_comes() -> None:
    assert told("hermes", "<think>", "\nWell", ", yes\n", "no</th", "ink>\n", "\nYes") == [
        [],
        [ReasoningText("Well")],
        [ReasoningText(", yes")],
        [ReasoningText("\nno")],
        [],
        [ContentText("Yes", 30)],
        [],
    ]


def test_whether_it_thinks_is_known_as_it_goes() -> None:
    parser = BY_NAME["harmony"].make_parser(ParserInput("<|start|>assistant", TOOLS, lambda _: False))
    seen = []
    for piece in (
        "<|channel|>analysis<|message|>",
        "Hm.",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>Yes",
    ):
        parser.push(piece)
        seen.append(parser.is_reasoning)
    assert seen == [True, True, False, False]


def test_a_string_of_gemma_comes_as_it_is_written() -> None:
    assert told("gemma4", '<|tool_call>call:add{a:<|"|>one', ' "two"', '<|"|>}', "<tool_call|>") == [
        [CallBegin(0, "add"), CallArguments(0, '{"a": "one')],
        [CallArguments(0, ' \\"two\\"')],
        [CallArguments(0, '"}')],
        [],
        [],
    ]
