"""From what a client asks for to a grammar: which bodies, in which order, around what."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from lmserve.errors import InvalidRequest
from lmserve.service.parsing.family import CallSyntax, Family, Reasoning
from lmserve.service.parsing.tool_request import SYNTAX
from lmserve.service.structure import (
    Kind,
    OutputFormat,
    make_grammar,
    make_output_plan,
    make_plain_grammar,
    make_plan,
)
from lmserve.service.tools import Tool, Toolbox, ToolChoice
from tests.grammar.byte_matcher import TOKENIZER, accepts

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = (Tool("weather", "", CITY), Tool("stop", "", {}))
THINKS = Reasoning("<think>", "</think>")
OBJECT = OutputFormat("json", {"type": "object", "properties": {"a": {"type": "integer"}}}, "response_format")


def toolbox(mode: Any, name: str | None = None, *, parallel: bool = True) -> Toolbox:
    return Toolbox(TOOLS, ToolChoice(mode, name), parallel)


def family(reasoning: Reasoning | None = None, syntax: CallSyntax = SYNTAX, before_content: str = "") -> Family:
    def make_parser(_: Any) -> Any:
        raise AssertionError("nothing is parsed here")

    return Family("test", syntax, reasoning, make_parser, (), str, before_content)


def matcher(
    output: OutputFormat | None, tools: Toolbox | None, *, prompt: str = "", like: Family | None = None
) -> LLMatcher:
    like = like or family()
    plan = make_plan(output, tools, like.syntax)
    assert plan is not None
    made = LLMatcher(TOKENIZER, make_grammar(plan, like, prompt, {}), log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def call(name: str, arguments: str) -> str:
    return f'[TOOL_REQUEST]{{"name": "{name}", "arguments": {arguments}}}[END_TOOL_REQUEST]'


WEATHER, STOP = call("weather", '{"city": "Rome"}'), call("stop", "{}")


def test_free_outputs_have_no_grammar() -> None:
    assert make_plan(None, None, SYNTAX) is None
    assert make_plan(None, toolbox("auto"), SYNTAX) is None
    assert make_plan(None, toolbox("none"), SYNTAX) is None


def test_required_calls() -> None:
    made = matcher(None, toolbox("required"))
    assert accepts(made, WEATHER)
    assert accepts(made, f"{STOP}\n{WEATHER}")
    for bad in ("", "Hello", call("weather", "{}"), call("stop", '{"a": 1}'), call("other", "{}"), WEATHER + STOP):
        assert not accepts(made, bad), bad


def test_a_named_tool_is_called_once() -> None:
    made = matcher(None, toolbox("required", "weather"))
    assert accepts(made, WEATHER)
    assert not accepts(made, STOP)
    assert not accepts(made, f"{WEATHER}\n{WEATHER}")


@pytest.mark.parametrize("like", [family(), family(syntax=CallSyntax("", ":", "", may_repeat=False))])
def test_one_call_where_more_are_not_wanted_or_not_known(like: Family) -> None:
    one = matcher(None, toolbox("required", parallel=False), like=like)
    text = WEATHER if like.syntax is SYNTAX else 'weather:{"city": "Rome"}'
    assert accepts(one, text)
    assert not accepts(one, f"{text}\n{text}")


def test_a_format_beside_tools_holds_for_what_is_no_call() -> None:
    made = matcher(OBJECT, toolbox("auto"))
    assert accepts(made, WEATHER)
    assert accepts(made, '{"a": 1}')
    assert not accepts(made, "Hello")
    forced = matcher(OBJECT, toolbox("required"))
    assert not accepts(forced, '{"a": 1}')
    shown = matcher(OBJECT, toolbox("none"))
    assert not accepts(shown, WEATHER)


def test_a_model_may_think_first_as_far_as_its_prompt_allows() -> None:
    like = family(THINKS)
    possible = matcher(OBJECT, None, prompt="<user>Hi<assistant>", like=like)
    assert accepts(possible, '<think>hm</think>\n{"a": 1}')
    assert accepts(possible, '{"a": 1}')
    begun = matcher(OBJECT, None, prompt="<assistant><think>\n", like=like)
    assert accepts(begun, 'hm</think>{"a": 1}')
    assert not accepts(begun, '{"a": 1}')
    closed = matcher(OBJECT, None, prompt="<assistant><think>\n\n</think>\n\n", like=like)
    assert accepts(closed, '{"a": 1}')
    assert not accepts(closed, '<think>hm</think>\n{"a": 1}')


def test_answers_begin_as_the_family_has_it() -> None:
    made = matcher(OBJECT, toolbox("auto"), like=family(before_content="final:"))
    assert accepts(made, 'final:{"a": 1}')
    assert accepts(made, WEATHER)
    assert not accepts(made, '{"a": 1}')


def test_objects_get_what_they_name_only() -> None:
    made = matcher(OBJECT, None)
    assert accepts(made, "{}")
    assert not accepts(made, '{"a": 1, "b": 2}')
    free = matcher(OutputFormat("json", {"type": "object"}, "response_format"), None)
    assert accepts(free, '{"b": 2}')


@pytest.mark.parametrize(
    ("parameters", "good"),
    [
        ({}, "{}"),
        ({"type": "object"}, "{}"),
        ({"type": "object", "properties": {}}, "{}"),
        ({"properties": CITY["properties"]}, "{}"),
    ],
)
def test_tools_without_parameters_get_an_empty_object(parameters: dict[str, Any], good: str) -> None:
    box = Toolbox((Tool("f", "", parameters),), ToolChoice("required"))
    made = matcher(None, box)
    assert accepts(made, call("f", good))
    assert not accepts(made, call("f", '{"x": 1}'))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("regex", "[0-9]{2}", "42"),
        ("choice", ["a", "b"], "b"),
        ("lark", 'start: "x"+', "xxx"),
        ("json", True, '[{"x": 1}]'),
    ],
)
def test_the_other_kinds(kind: Kind, value: Any, text: str) -> None:
    plan = make_output_plan(OutputFormat(kind, value, "field"))
    made = LLMatcher(TOKENIZER, make_plain_grammar(plan, {}), log_level=0)
    assert accepts(made, text)
    assert not accepts(made, text + "!")
    assert [claim.path for claim in plan.claims] == ["field"]


@pytest.mark.parametrize(
    ("kind", "value", "param", "words"),
    [
        ("regex", "", "field", "1 to"),
        ("regex", 5, "field", "must be a string"),
        ("regex", "a" * 9000, "field", "8192"),
        ("lark", "x" * 70_000, "field", "65536"),
        ("choice", [], "field", "at least one"),
        ("choice", "ab", "field", "array"),
        ("choice", ["a", ""], "field[1]", "1 to"),
        ("choice", ["a"] * 1025, "field", "limit is 1024"),
        ("json", {"type": "object", "properties": {"a": {"not": {}}}}, "field.properties.a.not", "not"),
        ("json", [], "field", "object"),
    ],
)
def test_refusals_name_their_field_and_limit(kind: Kind, value: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_output_plan(OutputFormat(kind, value, "field"))
    assert caught.value.param == param
    assert words in str(caught.value)


def test_a_tools_schema_is_refused_by_its_path() -> None:
    box = Toolbox((*TOOLS, Tool("f", "", {"properties": {"a": {"if": {}}}})), ToolChoice("required"))
    with pytest.raises(InvalidRequest) as caught:
        make_plan(None, box, SYNTAX)
    assert caught.value.param == "tools[2].function.parameters.properties.a.if"


def test_each_part_is_proved_by_its_own_field() -> None:
    plan = make_plan(OBJECT, toolbox("auto"), SYNTAX)
    assert plan is not None
    paths = [claim.path for claim in plan.claims]
    assert paths == ["tools[0].function.parameters", "tools[1].function.parameters", "response_format"]
    assert plan.num_calls == 1
    assert json.loads(make_plain_grammar(plan, {}))["grammars"]
