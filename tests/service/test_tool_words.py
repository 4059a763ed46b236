from __future__ import annotations

import json

import pytest

from lmserve.service.parsing.family import CallSyntax
from lmserve.service.parsing.tool_request import SYNTAX as DEFAULT_SYNTAX
from lmserve.service.tool_words import (
    describe_tools,
    join_contents,
    put_in_front,
    show_tool,
    write_calls,
    write_result,
)
from lmserve.service.tools import Tool, Toolbox, ToolChoice

SCHEMA = {"type": "object", "properties": {"città": {"type": "string"}}}
TOOLS = (Tool("f", "Tells the weather.", SCHEMA), Tool("g", "", {}))
USER = {"role": "user", "content": "Hi"}


def text(part: str) -> dict[str, str]:
    return {"type": "text", "text": part}


def test_calls_in_the_default_syntax_are_lm_studios() -> None:
    assert write_calls([("f", '{"a": 1}'), ("g", "{}")], DEFAULT_SYNTAX) == (
        '[TOOL_REQUEST]{"name": "f", "arguments": {"a": 1}}[END_TOOL_REQUEST]\n'
        '[TOOL_REQUEST]{"name": "g", "arguments": {}}[END_TOOL_REQUEST]'
    )


def test_every_part_of_a_familys_syntax_is_written() -> None:
    syntax = CallSyntax("<n>", "<a>", "</a>", begin="<calls>", separator=";", end="</calls>")
    assert write_calls([("f", "{}"), ("g", "[]")], syntax) == "<calls><n>f<a>{}</a>;<n>g<a>[]</a></calls>"


def test_tools_are_described_one_a_line_with_the_syntax_of_calls() -> None:
    words = describe_tools(Toolbox(TOOLS, ToolChoice("auto")), DEFAULT_SYNTAX)
    lines = words.splitlines()
    assert json.loads(lines[1]) == {"name": "f", "description": "Tells the weather.", "parameters": SCHEMA}
    assert "città" in lines[1]
    assert json.loads(lines[2])["name"] == "g"
    assert '[TOOL_REQUEST]{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}[END_TOOL_REQUEST]' in lines


@pytest.mark.parametrize(
    ("choice", "said", "unsaid"),
    [
        (ToolChoice("auto"), "answer without a call", "must"),
        (ToolChoice("required"), "must call a tool", "answer without a call"),
        (ToolChoice("required", "g"), "must call g", '"name": "f"'),
    ],
)
def test_what_the_choice_asks_for_is_said(choice: ToolChoice, said: str, unsaid: str) -> None:
    words = describe_tools(Toolbox(TOOLS, choice), DEFAULT_SYNTAX)
    assert said in words
    assert unsaid not in words


def test_several_calls_are_offered_only_where_they_are_allowed() -> None:
    once = CallSyntax("<", "|", ">", may_repeat=False)
    assert "several" in describe_tools(Toolbox(TOOLS, ToolChoice("auto")), DEFAULT_SYNTAX)
    assert "several" not in describe_tools(Toolbox(TOOLS, ToolChoice("auto")), once)
    assert "several" not in describe_tools(Toolbox(TOOLS, ToolChoice("auto"), parallel=False), DEFAULT_SYNTAX)
    assert "several" not in describe_tools(Toolbox(TOOLS, ToolChoice("required", "f")), DEFAULT_SYNTAX)


def test_a_tool_always_has_properties_to_iterate_over() -> None:
    empty = {"type": "object", "properties": {}}
    assert show_tool(TOOLS[1]) == {
        "type": "function",
        "function": {"name": "g", "description": "", "parameters": empty},
    }
    own = {"additionalProperties": False, "properties": {}, "type": "object"}
    assert list(show_tool(Tool("f", "", own))["function"]["parameters"]) == list(own), "in the client's order"


def test_results_with_and_without_a_name() -> None:
    assert write_result("f", "21") == "[TOOL_RESULT]f: 21[END_TOOL_RESULT]"
    assert write_result("", "") == "[TOOL_RESULT][END_TOOL_RESULT]"
    assert write_result("f", [text("a"), {"type": "image"}]) == [
        text("[TOOL_RESULT]f: a"),
        {"type": "image"},
        text("[END_TOOL_RESULT]"),
    ]


def test_contents_are_joined() -> None:
    assert join_contents("a", "b", "\n") == "a\nb"
    assert join_contents("", "b", "\n") == "b"
    assert join_contents("a", "", "\n") == "a"
    assert join_contents([text("a")], "b", "\n") == [text("a\nb")]
    assert join_contents([{"type": "image"}], "b", "\n") == [{"type": "image"}, text("b")]
    assert join_contents([text("")], "b", "\n") == [text("b")]


def test_words_of_the_system_stand_where_the_template_takes_them() -> None:
    system = {"role": "system", "content": "Rhyme."}
    assert put_in_front([USER], "W", takes_system=True) == [{"role": "system", "content": "W"}, USER]
    assert put_in_front([system, USER], "W", takes_system=True) == [{**system, "content": "Rhyme.\n\nW"}, USER]
    developer = {**system, "role": "developer"}
    assert put_in_front([developer, USER], "W", takes_system=True) == [{**developer, "content": "Rhyme.\n\nW"}, USER]
    assert put_in_front([USER, system], "W", takes_system=True) == [{"role": "system", "content": "W"}, USER, system]
    assert put_in_front([USER, USER], "W", takes_system=False) == [{**USER, "content": "W\n\nHi"}, USER]
    assistant = {"role": "assistant", "content": "Hi"}
    assert put_in_front([assistant], "W", takes_system=False) == [{"role": "user", "content": "W"}, assistant]
    assert put_in_front([USER], "W", takes_system=True, style="parts")[0]["content"] == [text("W")]
