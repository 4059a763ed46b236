"""Every text that a grammar accepts is valid under the client's schema, for schemas and texts nobody thought of."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import jsonschema_rs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lmserve.errors import InvalidRequest
from lmserve.grammar.formats import FORMATS
from lmserve.grammar.schema import enforceable
from tests.grammar.byte_matcher import CannotCompile, compiled, random_output

OUTPUTS_PER_SCHEMA = 6


def violations(schema: dict[str, Any], output: bytes) -> list[str]:
    """What two validators, one in Python and one in Rust, say against an output."""
    value = json.loads(output.decode("utf-8"))
    has_arrays_of_items = '"items": [' in json.dumps(schema)
    first = jsonschema.Draft201909Validator if has_arrays_of_items else jsonschema.Draft202012Validator
    found = [error.message for error in first(schema, format_checker=first.FORMAT_CHECKER).iter_errors(value)]
    if not re.search(rb"[0-9][eE]", output):  # infinity is not for the second one to take
        second = jsonschema_rs.Draft201909Validator if has_arrays_of_items else jsonschema_rs.Draft202012Validator
        found += [error.message for error in second(schema, validate_formats=True).iter_errors(value)]
    return found


NAMES = st.sampled_from(["a", "b", "ab", "é", "x-y", 'q"', "", "a\n", "名"])
NUMBERS = st.one_of(
    st.integers(-1000, 1000),
    st.sampled_from([0, 0.1, 0.3, -0.5, 1e-7, 2.5, 10.0, 2**53, -(2**53), 99.999]),
    st.floats(-1e6, 1e6),
)
PATTERNS = st.sampled_from(
    [
        "^a",
        "b$",
        "^[a-c]+$",
        "^(?:x|yé)*$",
        r"^\d{2,3}$",
        r"^\w+$",
        r"\W",
        r"^\D\S\s?$",
        r"[^\d]",
        r"^[^\w\s]{1,3}$",
        "^.$",
        "a|^b$",
        r"^[\W\d]+$",
        "^$",
    ]
)
NAME_PATTERNS = st.sampled_from(["^a", "^x-", "b$", "^[0-9]+$", "^é$", "^[a-z]{2}$", "a.$", "^$", "^(?:a|b)$"])
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "a", "é", "a\nb", '"', "\\", "/", "2020-02-29", "😀"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=4,
)
REFERENCES = st.sampled_from(["#", "#/$defs/one", "#/$defs/two", "#/$defs/one/properties/a", "#there"])


def _keywords(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    small = st.integers(0, 3)
    return {
        "type": st.one_of(
            st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"]),
            st.lists(
                st.sampled_from(["null", "integer", "number", "string", "array", "object"]),
                min_size=1,
                max_size=3,
                unique=True,
            ),
        ),
        "properties": st.dictionaries(NAMES, inner, max_size=3),
        "patternProperties": st.dictionaries(NAME_PATTERNS, inner, max_size=2),
        "additionalProperties": inner,
        "required": st.lists(NAMES, max_size=2, unique=True),
        "minProperties": small,
        "maxProperties": small,
        "items": st.one_of(inner, st.lists(inner, min_size=1, max_size=2)),
        "prefixItems": st.lists(inner, min_size=1, max_size=2),
        "additionalItems": inner,
        "minItems": small,
        "maxItems": small,
        "minLength": small,
        "maxLength": st.integers(0, 6),
        "pattern": PATTERNS,
        "format": st.sampled_from(list(FORMATS)),
        "minimum": NUMBERS,
        "maximum": NUMBERS,
        "exclusiveMinimum": NUMBERS,
        "exclusiveMaximum": NUMBERS,
        "multipleOf": st.sampled_from([1, 2, 3, 7, 0.5, 0.25, 10, 2.0]),
        "const": VALUES,
        "enum": st.lists(VALUES, min_size=1, max_size=4),
        "$ref": REFERENCES,
        "$anchor": st.just("there"),
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "anyOf": st.lists(inner, min_size=1, max_size=3),
        "oneOf": st.lists(inner, min_size=1, max_size=3),
        "title": st.just("a title"),
    }


GROUPS = {
    "string": ["minLength", "maxLength", "pattern", "format"],
    "number": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
    "integer": ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"],
    "array": ["items", "prefixItems", "minItems", "maxItems", "additionalItems"],
    "object": ["properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"],
}


@st.composite
def _schema(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Keywords of one type mostly, so that they meet; now and then any; in any order."""
    strategies = _keywords(inner)
    kind = draw(st.sampled_from([*GROUPS, "any"]))
    if kind == "any":
        names = draw(st.lists(st.sampled_from(list(strategies)), max_size=3, unique=True))
        return {name: draw(strategies[name]) for name in names}
    names = draw(st.lists(st.sampled_from(GROUPS[kind]), max_size=4, unique=True))
    extra = draw(st.lists(st.sampled_from(["enum", "const", "allOf", "anyOf", "oneOf", "$ref"]), max_size=1))
    order = draw(st.permutations(["type", *names, *extra]))
    return {name: kind if name == "type" else draw(strategies[name]) for name in order}


SCHEMAS = st.recursive(st.one_of(st.booleans(), _schema(st.just(True))), _schema, max_leaves=5)
ROOTS = st.builds(
    lambda root, one, two: {**root, "$defs": {"one": one, "two": two}} if isinstance(root, dict) else {"items": root},
    SCHEMAS,
    SCHEMAS,
    SCHEMAS,
)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=ROOTS, seed=st.integers(0, 2**32))
def test_outputs_of_any_schema_are_valid(schema: dict[str, Any], seed: int) -> None:
    try:
        matcher = compiled(enforceable(schema, "schema"))
    except (InvalidRequest, CannotCompile):
        assume(False)
    rng = random.Random(seed)
    for _ in range(OUTPUTS_PER_SCHEMA):
        output = random_output(matcher, rng)
        if output is not None:
            assert violations(schema, output) == [], (schema, output)
