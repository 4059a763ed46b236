"""Models whose tokenizer brings a response template, read by transformers' own parser."""

from __future__ import annotations

from typing import Any

import pytest

from lmserve.service.parsing.events import CallBegin, ContentText, Event, ReasoningText, control
from lmserve.service.parsing.family import ParserInput
from lmserve.service.parsing.table import find_family
from tests.service.parsing.replay import Folded, fold, replay, tool
from tests.service.tokenizers_for_tests import byte_level

TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<bot>",
    "fields": {
        "thinking": {"open": "<hm>", "close": "</hm>", "content": "text"},
        "tool_calls": {
            "open": "<do>",
            "close": "</do>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.with}"}},
        },
        "content": {"content": "text"},
    },
}
TOOLS = [tool("add", {"type": "object", "properties": {"n": {"type": "integer"}}})]
ADD = '<do>{"name": "add", "with": {"n": 1}}</do>'


def tokenizer(template: Any = TEMPLATE) -> Any:
    made = byte_level()
    made.response_template = template
    return made


def without(name: str, text: str | None) -> str | None:
    return text and text.replace(name, "")


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<bot>", "Hello <there>.\n", Folded(None, "Hello <there>.\n", [])),
        ("<bot>", "<hm>\nWell.\n</hm>\n\nYes.", Folded("Well.", "Yes.", [])),
        ("<hm></hm><bot><hm>", "Well.</hm>Yes.", Folded("Well.", "Yes.", [])),
        ("<bot>", f"Now:\n{ADD}\n{ADD}", Folded(None, "Now:", [("add", '{"n": 1}')] * 2)),
        ("<bot>", f"<hm>{ADD}", Folded(ADD, None, [])),
        ("<bot>", '<do>{"name": "rm", "with": {}}</do> ok', Folded(None, '<do>{"name": "rm", "with": {}}</do> ok', [])),
        ("<bot>", f"So <do>{{oops}}</do> {ADD}", Folded(None, f"So <do>{{oops}}</do> {ADD}", [])),
        ("<bot>", '<do>{"name": "add", "wi', Folded(None, '<do>{"name": "add", "wi', [])),
        ("<bot>", "<do>[1, 2]</do>", Folded(None, "<do>[1, 2]</do>", [])),
        ("<bot>", "a <d", Folded(None, "a <d", [])),
        ("<bot>", "", Folded(None, None, [])),
    ],
)
@pytest.mark.parametrize("special", [False, True])
def test_an_output_is_read_by_the_template_however_it_is_cut(
    prompt: str, text: str, expected: Folded, special: bool
) -> None:
    """Where markers are control tokens they are no text, also when they turn out to mark nothing."""
    names = ("<hm>", "</hm>", "<do>", "</do>") if special else ()
    for name in names:
        text = text.replace(name, control(name))
        expected = Folded(without(name, expected.reasoning), without(name, expected.content), expected.calls)
    family = find_family("{{ messages }}", tokenizer())
    assert family.name == "response_template"
    parser_input = ParserInput(prompt, TOOLS, frozenset(names).__contains__)
    for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(1, len(text)))):
        events = replay(family, parser_input, pieces)
        assert fold(events) == expected, pieces
        for event in events:
            if isinstance(event, ContentText):
                assert text[event.start : event.start + len(event.text)] == event.text


def test_it_streams() -> None:
    """And calls come when they are complete."""
    family = find_family(None, tokenizer())
    assert family.reasoning is not None
    assert (family.reasoning.begin, family.reasoning.end) == ("<hm>", "</hm>")
    parser = family.make_parser(ParserInput("<bot>", TOOLS, lambda _: False))
    told: list[tuple[Event, ...]] = [
        tuple(parser.push(piece)) for piece in ("<h", "m>a", "b</", "hm>", "c", "<do", f"{ADD[3:-1]}", ">")
    ]
    assert told[:6] == [(), (ReasoningText("a"),), (ReasoningText("b"),), (), (ContentText("c", 11),), ()]
    assert told[6] == ()
    assert told[7][0] == CallBegin(0, "add")


def test_without_tools_its_calls_are_content() -> None:
    family = find_family(None, tokenizer())
    assert fold(replay(family, ParserInput("<bot>", (), lambda _: False), [ADD])) == Folded(None, ADD, [])


def test_a_line_of_the_table_comes_first() -> None:
    assert find_family("<tool_call>", tokenizer()).name == "hermes"


@pytest.mark.parametrize(
    "template",
    [
        {},
        {"fields": []},
        {"fields": {"content": {"content": "no such"}}},
        {"fields": {"content": 1}, "start_anchor": "x"},
        {"fields": {"content": {"open_pattern": "("}}, "start_anchor": "x"},
    ],
)
def test_a_template_that_cannot_be_used_is_as_none(template: Any) -> None:
    assert find_family(None, tokenizer(template)).name == "tool_request"


def test_a_template_without_reasoning_has_none() -> None:
    plain = {**TEMPLATE, "fields": {"content": {"content": "text"}}}
    assert find_family(None, tokenizer(plain)).reasoning is None
