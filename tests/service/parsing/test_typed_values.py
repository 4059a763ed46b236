"""Values that only a schema gives a type."""

from __future__ import annotations

from typing import Any

import pytest

from lmserve.service.parsing.typed_values import parameter_types, typed_json
from tests.service.parsing.replay import tool

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("schema", "raw", "expected"),
    [
        ({"type": "string"}, "42", '"42"'),
        ({"type": "string"}, "null", '"null"'),
        ({"enum": ["1", "2"]}, "1", '"1"'),
        ({"const": "1"}, "1", '"1"'),
        ({"type": "integer"}, "42", "42"),
        ({"type": "integer"}, "forty", '"forty"'),
        ({"type": "integer"}, "1.5", '"1.5"'),
        ({"type": "integer"}, "2.0", "2.0"),
        ({"type": "number"}, " 1.5 ", "1.5"),
        ({"type": "object"}, "{'a': '\\ud800'}", '{"a": "\\ud800"}'),
        ({"type": "integer"}, "9" * 5000, '"' + "9" * 5000 + '"'),
        ({"type": "number"}, "1e400", '"1e400"'),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({"type": "boolean"}, "True", "true"),
        ({"type": "boolean"}, "false", "false"),
        ({"type": "boolean"}, "1", '"1"'),
        ({"type": "integer"}, "true", '"true"'),
        ({"type": ["string", "null"]}, "None", "null"),
        ({"type": ["string", "integer"]}, "7", "7"),
        ({"type": "string", "nullable": True}, "null", "null"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "x", '"x"'),
        ({"anyOf": [{"type": "array"}, {"$ref": "#/x"}]}, "{}", "{}"),
        ({"type": "object"}, "{'a': (1, None)}", '{"a": [1, null]}'),
        ({"type": "object"}, "{'a': open('x')}", "\"{'a': open('x')}\""),
        ({"type": "object"}, "{1, 2}", '"{1, 2}"'),
        ({"type": "array"}, '["é"]', '["é"]'),
        ({"type": "array"}, "{}", '"{}"'),
        ({"type": "array"}, DEEP, f'"{DEEP}"'),
        ({}, "True", '"True"'),
        ({}, "[1]", "[1]"),
        ({}, "plain", '"plain"'),
        ("no schema", "1", "1"),
        ({"type": "strange"}, "1", "1"),
    ],
)
def test_a_value_has_the_type_that_its_schema_says(schema: Any, raw: str, expected: str) -> None:
    types = parameter_types(tool("f", {"properties": {"k": schema}}), "k")
    assert typed_json(raw, types) == expected


@pytest.mark.parametrize("parameters", [{}, {"properties": []}, {"properties": {}}])
def test_a_parameter_that_is_not_in_the_schema_may_have_any_type(parameters: dict[str, Any]) -> None:
    assert parameter_types(tool("f", parameters), "k") == frozenset()


def test_unions_without_end_end() -> None:
    schema: dict[str, Any] = {}
    schema["anyOf"] = [schema]
    assert parameter_types(tool("f", {"properties": {"k": schema}}), "k") == frozenset()
