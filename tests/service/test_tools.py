from __future__ import annotations

from typing import Any

import pytest

from lmserve.errors import InvalidRequest
from lmserve.service.tools import MAX_TOOLS, Tool, Toolbox, ToolChoice, make_toolbox


def tool(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_tools_as_openai_writes_them() -> None:
    toolbox = make_toolbox([tool("f", description="Adds.", parameters=SCHEMA, strict=True), tool("g.h-i_2")])
    assert toolbox == Toolbox((Tool("f", "Adds.", SCHEMA, True), Tool("g.h-i_2", "", {})), ToolChoice("auto"), True)


@pytest.mark.parametrize(
    ("strict", "expected"), [(True, True), (False, False), (None, False), ("true", True), ("false", False)]
)
def test_strict_in_the_ways_clients_write_it(strict: object, expected: bool) -> None:
    toolbox = make_toolbox([tool(strict=strict)])
    assert toolbox is not None
    assert toolbox.tools[0].strict is expected


@pytest.mark.parametrize(("parallel", "expected"), [(None, True), (True, True), (False, False)])
def test_parallel_calls_unless_they_are_turned_off(parallel: object, expected: bool) -> None:
    toolbox = make_toolbox([tool()], "auto", parallel)
    assert toolbox is not None
    assert toolbox.parallel is expected


@pytest.mark.parametrize(
    ("choice", "expected", "callable_names"),
    [
        (None, ToolChoice("auto"), ["f", "g"]),
        ("auto", ToolChoice("auto"), ["f", "g"]),
        ("none", ToolChoice("none"), []),
        ("required", ToolChoice("required"), ["f", "g"]),
        (named("g"), ToolChoice("required", "g"), ["g"]),
        ({"function": {"name": "g"}}, ToolChoice("required", "g"), ["g"]),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("g")]}},
            ToolChoice("auto"),
            ["g"],
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("g"), named("f")]}},
            ToolChoice("required"),
            ["f", "g"],
        ),
    ],
)
def test_choices(choice: object, expected: ToolChoice, callable_names: list[str]) -> None:
    toolbox = make_toolbox([tool("f"), tool("g")], choice)
    assert toolbox is not None
    assert toolbox.choice == expected
    assert [each.name for each in toolbox.callable_tools] == callable_names


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_no_tools(tools: object, choice: object) -> None:
    assert make_toolbox(tools, choice, True) is None


def test_functions_as_they_were_before_tools() -> None:
    functions = [{"name": "f", "parameters": SCHEMA}, {"name": "g"}]
    tools = (Tool("f", "", SCHEMA), Tool("g", "", {}))
    assert make_toolbox(functions=functions) == Toolbox(tools, ToolChoice("auto"))
    assert make_toolbox(functions=functions, function_call="none") == Toolbox(tools, ToolChoice("none"))
    assert make_toolbox(functions=functions, function_call={"name": "g"}) == Toolbox(tools, ToolChoice("required", "g"))


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "tools"),
        ([tool(), "f"], "tools[1]"),
        ([{"function": {"name": "f"}}], "tools[0].type"),
        ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
        ([{"type": ["function"], "function": {"name": "f"}}], "tools[0].type"),
        ([{"type": "function", "name": "f"}], "tools[0].function"),
        ([{"type": "function", "function": "f"}], "tools[0].function"),
        ([tool(None)], "tools[0].function.name"),
        ([tool("")], "tools[0].function.name"),
        ([tool("a b")], "tools[0].function.name"),
        ([tool("a\n")], "tools[0].function.name"),
        ([tool("a" * 65)], "tools[0].function.name"),
        ([tool("f"), tool("g"), tool("f")], "tools[2].function.name"),
        ([tool(description=3)], "tools[0].function.description"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(strict=1.0)], "tools[0].function.strict"),
        ([tool(strict=[])], "tools[0].function.strict"),
        ([tool(parameters="{}")], "tools[0].function.parameters"),
        ([tool(parameters={"type": "array"})], "tools[0].function.parameters.type"),
    ],
)
def test_malformed_tools_are_named(tools: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_toolbox(tools)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_as_many_tools_as_the_limit() -> None:
    toolbox = make_toolbox([tool(f"f{i}") for i in range(MAX_TOOLS)])
    assert toolbox is not None
    assert len(toolbox.tools) == MAX_TOOLS


def test_a_deep_schema_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequest, match="levels deep") as caught:
        make_toolbox([tool(parameters=deep)])
    assert caught.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("any", "tool_choice"),
        (3, "tool_choice"),
        ({"type": "custom", "custom": {"name": "f"}}, "tool_choice.type"),
        ({"type": "function"}, "tool_choice.function.name"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        (named("h"), "tool_choice.function.name"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [named("f")]}},
            "tool_choice.allowed_tools.mode",
        ),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tool_choice.allowed_tools.tools"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("f"), "g"]}},
            "tool_choice.allowed_tools.tools[1]",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("f"), named("h")]}},
            "tool_choice.allowed_tools.tools[1].function.name",
        ),
    ],
)
def test_malformed_choices_are_named(choice: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_toolbox([tool("f"), tool("g")], choice)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [tool()], "functions": [{"name": "f"}]}, "functions"),
        ({"tools": [tool()], "tool_choice": "auto", "function_call": "auto"}, "function_call"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": {}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"function_call": {"name": "g"}}, "function_call"),
    ],
)
def test_fields_that_do_not_fit_together(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_toolbox(**fields)
    assert caught.value.param == param
