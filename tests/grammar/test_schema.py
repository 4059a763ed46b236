"""The gate: what it refuses, by which path, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from lmserve.errors import InvalidRequest
from lmserve.grammar.schema import enforceable
from tests.grammar.byte_matcher import accepts, compiled

P = "response_format.json_schema.schema"


def refusal(schema: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        enforceable(schema, P)
    assert str(caught.value).startswith(str(caught.value.param))
    return caught.value


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: list[tuple[object, str]] = [
    # what is not enforced, wherever it stands
    ({"properties": {"a": {"not": {}}}}, ".properties.a.not"),
    ({"$defs": {"a": {"if": True}}}, ".$defs.a.if"),
    ({"anyOf": [True, {"contains": True}]}, ".anyOf[1].contains"),
    ({"items": {"uniqueItems": True}}, ".items.uniqueItems"),
    ({"patternProperties": {"^a": {"nullable": True}}}, ".patternProperties.^a.nullable"),
    ({"additionalProperties": {"minlength": 1}}, ".additionalProperties.minlength"),
    ({"prefixItems": [{"propertyNames": {}}]}, ".prefixItems[0].propertyNames"),
    ({"x-guidance": {"lenient": True}}, ".x-guidance"),
    ({"dependentRequired": {}}, ".dependentRequired"),
    ({"format": "int32"}, ".format"),
    # of the wrong type
    ([], ""),
    (None, ""),
    (False, ""),
    ({"properties": []}, ".properties"),
    ({"properties": {"a": 1}}, ".properties.a"),
    ({"required": "a"}, ".required"),
    ({"required": [1]}, ".required"),
    ({"required": ["a", "a"]}, ".required"),
    ({"enum": "a"}, ".enum"),
    ({"enum": []}, ".enum"),
    ({"anyOf": []}, ".anyOf"),
    ({"allOf": {}}, ".allOf"),
    ({"type": "text"}, ".type"),
    ({"type": []}, ".type"),
    ({"type": ["null", "null"]}, ".type"),
    ({"minimum": "1"}, ".minimum"),
    ({"minimum": True}, ".minimum"),
    ({"maximum": float("inf")}, ".maximum"),
    ({"exclusiveMinimum": True, "minimum": 1}, ".exclusiveMinimum"),
    ({"minLength": -1}, ".minLength"),
    ({"maxItems": 1.5}, ".maxItems"),
    ({"pattern": 1}, ".pattern"),
    ({"multipleOf": 0}, ".multipleOf"),
    ({"discriminator": "kind", "anyOf": [True]}, ".discriminator"),
    # that validators would take otherwise than the grammar
    ({"multipleOf": 0.1}, ".multipleOf"),
    ({"const": 2**53 + 1}, ".const"),
    ({"exclusiveMinimum": 2**53}, ".exclusiveMinimum"),
    ({"type": "number", "minimum": -(2**53), "exclusiveMaximum": -(2.0**53)}, ".exclusiveMaximum"),
    ({"const": 0.12345678901234567}, ".const"),
    ({"minimum": 1e300}, ".minimum"),
    ({"const": "\x01"}, ".const"),
    ({"enum": ["a", {"b": ["\ud800"]}]}, ".enum[1].b[0]"),
    ({"enum": [{"\x7f": 1}]}, ".enum[0].\x7f"),
    ({"properties": {"\x00": {}}}, ".properties.\x00"),
    ({"required": ["a", "\x1f"]}, ".required[1]"),
    ({"minProperties": 2}, ".minProperties"),
    (
        {"minProperties": 3, "required": ["a"], "additionalProperties": False, "patternProperties": {"^b": {}}},
        ".minProperties",
    ),
    ({"patternProperties": {r"^\d": {}}}, r".patternProperties.^\d"),
    *(
        ({"pattern": pattern}, ".pattern")
        for pattern in [
            "(",
            "(?i)a",
            "(?=a)",
            r"(a)\1",
            r"\bword",
            r"\p{L}",
            "a++",
            "[a&&b]",
            "[[:alpha:]]",
            "[a--b]",
            "(?P<n>a)",
        ]
    ),
    # references, dialects
    ({"$ref": "other.json"}, ".$ref"),
    ({"$ref": "#/$defs/none"}, ".$ref"),
    ({"$ref": "#/default", "default": {"type": "null"}}, ".$ref"),
    ({"$ref": "#none"}, ".$ref"),
    ({"items": {"$id": "urn:x"}}, ".items.$id"),
    ({"$schema": "urn:x"}, ".$schema"),
    ({"$schema": "https://json-schema.org/draft/2020-12/schema", "items": [{}]}, ".items"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, ".prefixItems"),
    ({"additionalItems": False, "items": {}}, ".additionalItems"),
    ({"anyOf": [{"$anchor": "a"}, {"$anchor": "a"}]}, ".anyOf[1].$anchor"),
    # branches that a value may share
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ".oneOf"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, ".oneOf"),
    ({"anyOf": [{"type": "object"}, {"type": "object"}], "discriminator": {"propertyName": "k"}}, ".discriminator"),
    # without an end
    ({"$ref": "#"}, ""),
    ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, ""),
    ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, ""),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}, ""),
]


@pytest.mark.parametrize(("schema", "path"), REFUSED, ids=[f"{i}{path[:40]!a}" for i, (_, path) in enumerate(REFUSED)])
def test_refused_by_the_path_of_the_keyword(schema: object, path: str) -> None:
    assert refusal(schema).param == P + path


@pytest.mark.parametrize(
    ("fits", "exceeds", "limit"),
    [
        (nested(31), nested(32), "32"),
        ({"description": "x" * 262_000}, {"description": "x" * 262_200}, "262,144"),
        (
            {"properties": {f"p{i}": {} for i in range(1000)}},
            {"properties": {f"p{i}": {} for i in range(1001)}},
            "1,000",
        ),
        (
            {"enum": list(range(10_000))},
            {"anyOf": [{"enum": list(range(5_000))}, {"enum": list(range(5_001))}]},
            "10,000",
        ),
        ({"anyOf": [{"const": i} for i in range(256)]}, {"anyOf": [{"const": i} for i in range(257)]}, "256"),
        ({"pattern": "a" * 1024}, {"pattern": "a" * 1025}, "1,024"),
        ({"minLength": 100_000}, {"minLength": 100_001}, "100,000"),
        ({"multipleOf": 10_000}, {"allOf": [{"multipleOf": 9_999}, {"multipleOf": 2}]}, "10,000"),
        ({"const": [[[[1]]]]}, {"const": [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}, "16"),
    ],
)
def test_limits(fits: dict[str, Any], exceeds: dict[str, Any], limit: str) -> None:
    compiled(enforceable(fits, P))
    assert f"{limit}" in str(refusal(exceeds))


PERSON = {"type": "object", "properties": {"kind": {"const": "person"}, "boss": {"$ref": "#"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]}

KEPT: list[tuple[object, list[str], list[str]]] = [
    (True, ["1", '{"a":[null]}'], ["", "{"]),
    ({"title": "t", "x-order": 1, "default": {"not": 1}, "deprecated": True, "type": "null"}, ["null"], ["1"]),
    ({"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
    (
        {"type": "number", "exclusiveMaximum": 10, "exclusiveMinimum": 0},
        ["9.95", "0.1"],
        ["10", "9.9999999999999999999", "0", "0.0"],
    ),
    ({"type": "integer", "exclusiveMaximum": 1}, ["0"], ["1"]),
    ({"type": "number", "maximum": 0.30000000000000004}, ["0.3"], ["0.30000000000000005"]),
    ({"const": 5.0}, ["5"], ["6"]),
    ({"items": [{"type": "null"}], "allOf": [{}], "additionalItems": False}, ["[null]"], ["[null,1]"]),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        ['{"a":1}', '{"b":"x"}'],
        ['{"\\u0061":"x"}', '{"a":"x"}'],
    ),
    (
        {"type": "object", "patternProperties": {"^a$": {"type": "integer"}}},
        ['{"a":1,"b":"x"}'],
        ['{"a":"x"}', '{"a\\n":"x"}'],
    ),
    (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2000-02-29"'],
        ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"', '"2023-04-31"'],
    ),
    (
        {"type": "string", "format": "date-time"},
        ['"2024-02-29T23:59:59.5Z"'],
        ['"2023-02-29T23:59:59Z"', '"2024-01-01T23:59:60Z"'],
    ),
    ({"type": "string", "format": "time"}, ['"23:59:59+01:00"'], ['"23:59:60Z"']),
    ({"type": "string", "format": "email", "pattern": "^a"}, ['"a@b.de"'], ['"b@b.de"', '"a@-b"', '"a"']),
    ({"type": "string", "pattern": r"^\W$"}, ['"!"'], ['"é"', '"a"']),
    ({"type": "string", "pattern": r"^\D$"}, ['"é"'], ['"٣"', '"3"']),
    ({"type": "string", "pattern": r"^[^\w]$"}, ['"!"'], ['"é"', '"a"']),
    ({"type": "string", "pattern": r"^\d\w$"}, ['"0a"'], ['"٣a"', '"0é"']),
    *(
        (
            {"type": "string", "pattern": pattern},
            ['"\u00a0"', '"\u3000"', '"\\t"'],
            ['"\x85"', '"\ufeff"', '"\\u001c"', '"a"'],
        )
        for pattern in (r"^\s$", r"^[\s]$", r"^[^\S]$")
    ),
    *(
        (
            {"type": "string", "pattern": pattern},
            ['"a"', '"é"'],
            ['"\x85"', '"\ufeff"', '"\\u001c"', '"\u00a0"', '"\\n"'],
        )
        for pattern in (r"^\S$", r"^[\S]$", r"^[^\s]$")
    ),
    ({"type": "string", "pattern": "^.$"}, ['"a"', '"\x85"'], ['"\\n"', '"\\r"', '"\u2028"', '"\u2029"']),
    ({"type": "string", "minLength": 2, "maxLength": 2}, ['"é😀"', '"\\n\\""'], ['"é"', '"abc"']),
    (
        {"type": ["object", "null"], "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        ["null", '{"n":{"n":null}}'],
        ["{}"],
    ),
    (
        {"oneOf": [PERSON, DOG], "discriminator": {"propertyName": "kind"}},
        ['{"kind":"wolf"}', '{"kind":"person"}'],
        ['{"kind":"cat"}', "{}"],
    ),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, ["null"], ["1"]),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"$ref": "#/properties/a"}, "type": "object"},
        ['{"a":null,"b":null}'],
        ['{"b":1}'],
    ),
    ({"type": "object", "properties": {}, "anyOf": [{}], "additionalProperties": False}, ["{}"], ['{"a":1}']),
]


@pytest.mark.parametrize(("schema", "taken", "left"), KEPT)
def test_kept_and_enforced(schema: object, taken: list[str], left: list[str]) -> None:
    matcher = compiled(enforceable(schema, P))
    assert [text for text in taken if not accepts(matcher, text)] == []
    assert [text for text in left if accepts(matcher, text)] == []


def test_a_schema_is_left_as_it_was() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"items": [True], "title": "A"}}, "title": "T"}
    before = repr(schema)
    assert enforceable(schema, P) == {
        "properties": {"a": {"$ref": "#/$defs/0"}},
        "$defs": {"0": {"prefixItems": [True]}},
    }
    assert repr(schema) == before


def test_blanks_are_bounded() -> None:
    matcher = compiled(enforceable({"type": "array", "items": {"type": "null"}}, P))
    assert accepts(matcher, "[" + " " * 8 + "null]")
    assert not accepts(matcher, "[" + " " * 9 + "null]")
