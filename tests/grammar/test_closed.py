"""Which objects get no properties but those that their schema names."""

from __future__ import annotations

from typing import Any

import pytest

from lmserve.grammar.closed import closed
from lmserve.grammar.schema import enforceable

NAME = {"type": "object", "properties": {"name": {"type": "string"}}}
CLOSED = {**NAME, "additionalProperties": False}


def close(schema: dict[str, Any]) -> dict[str, Any]:
    return closed(enforceable(schema, "schema"))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (NAME, CLOSED),
        ({"type": "array", "items": NAME}, {"type": "array", "items": CLOSED}),
        ({"type": "object", "properties": {"a": NAME}}, {"a": CLOSED}),
        ({"anyOf": [NAME, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"type": "object", "properties": {}}, {"additionalProperties": False}),
    ],
    ids=["root", "items", "nested", "branch", "no properties"],
)
def test_objects_that_name_their_properties_are_closed(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    found = close(schema)
    for key, value in expected.items():
        assert found.get(key, found.get("properties", {}).get(key)) == value


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**NAME, "additionalProperties": True},
        {**NAME, "additionalProperties": {"type": "integer"}},
        {**NAME, "patternProperties": {"^x": {"type": "integer"}}},
        {**NAME, "required": ["other"]},
        {"allOf": [NAME, {"type": "object", "properties": {"other": {"type": "string"}}}]},
        {**NAME, "anyOf": [{"required": ["name"]}, {"type": "object", "properties": {"other": {"type": "string"}}}]},
    ],
    ids=["none named", "open", "typed", "patterns", "required but not named", "allOf", "beside anyOf"],
)
def test_what_asks_for_more_or_shares_its_place_stays_as_it_is(schema: dict[str, Any]) -> None:
    gate = enforceable(schema, "schema")
    assert closed(gate) == gate


def test_a_definition_is_closed_unless_one_of_its_places_is_shared() -> None:
    definitions = {"alone": NAME, "shared": NAME, "within": NAME}
    shared = {
        "allOf": [{"$ref": "#/$defs/shared"}, {"type": "object", "properties": {"w": {"$ref": "#/$defs/within"}}}]
    }
    properties = {"a": {"$ref": "#/$defs/alone"}, "b": {"$ref": "#/$defs/shared"}, "c": shared}
    found = close({"type": "object", "properties": properties, "$defs": definitions})
    assert sorted(each == CLOSED for each in found["$defs"].values()) == [False, False, True]
    assert found["additionalProperties"] is False


def test_a_property_may_have_any_name() -> None:
    names = {name: {"type": "string"} for name in ("$ref", "allOf", "properties", "enum", "$defs", "items")}
    assert close({"type": "object", "properties": names})["additionalProperties"] is False
