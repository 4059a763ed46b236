"""Whether a recursive schema has an end: the grammar of one that has none would run to the last token allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmserve.grammar.references import Schema

_TYPES = ("null", "boolean", "number", "string", "array", "object")


def has_finite_value(schema: Schema, targets: Mapping[str, Schema]) -> bool:
    """Whether some finite value may satisfy the schema; ``targets`` are what its `$ref`s mean.

    Conditions that only together have no end (one branch requires what another describes) are taken to have one.
    """
    known: set[tuple[str, str]] = set()
    while True:
        found = {
            (name, kind)
            for name, target in targets.items()
            for kind in _TYPES
            if (name, kind) not in known and _has(target, kind, known)
        }
        if not found:
            return _has_any(schema, known)
        known |= found


def _has_any(schema: Schema, known: set[tuple[str, str]]) -> bool:
    return any(_has(schema, kind, known) for kind in _TYPES)


def _has(schema: Schema, kind: str, known: set[tuple[str, str]]) -> bool:
    """Whether it may have a finite value of the type, if ``known`` are the pairs of target and type that have one."""
    if isinstance(schema, bool):
        return schema
    if "type" in schema and not _names(schema["type"], kind):
        return False
    if "$ref" in schema and (schema["$ref"], kind) not in known:
        return False
    if not all(_has(branch, kind, known) for branch in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_has(branch, kind, known) for branch in schema[keyword]):
            return False
    if kind == "array":
        return _array_ends(schema, known)
    return kind != "object" or all(
        _has_any(member, known) for name in schema.get("required", ()) for member in _of_property(schema, name)
    )


def _names(types: str | list[str], kind: str) -> bool:
    listed = [types] if isinstance(types, str) else types
    return kind in listed or (kind == "number" and "integer" in listed)


def _array_ends(schema: dict[str, Any], known: set[tuple[str, str]]) -> bool:
    least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
    needed = [*prefix[:least], *([schema["items"]] if least > len(prefix) and "items" in schema else [])]
    return all(_has_any(item, known) for item in needed)


def _of_property(schema: dict[str, Any], name: str) -> list[Schema]:
    if name in schema.get("properties", {}):
        return [schema["properties"][name]]
    if "patternProperties" in schema:  # whether one matches is left to the grammar's engine
        return []
    return [schema["additionalProperties"]] if "additionalProperties" in schema else []
