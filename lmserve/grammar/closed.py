"""Objects that name their properties get no others.

JSON Schema lets an object have any properties beside those that it names, and a weak model then goes on inventing some
until it is cut off. Leaving them out is always valid, so that they come only where ``additionalProperties`` or
``patternProperties`` asks for them. An object is left as it is where several schemas speak of the same value
(``allOf``, say): each would forbid what the others name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")
_STRUCTURE = ("properties", "patternProperties", "items", "prefixItems")
_ONE_SCHEMA = ("items", "additionalItems", "additionalProperties")
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties")
_OPENING = (*_COMBINING, "additionalProperties", "patternProperties", "minProperties")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema out of ``enforceable``, whose definitions all stand in its ``$defs``."""
    definitions = schema.get("$defs", {})
    shared = _shared_definitions(schema, definitions)
    result: dict[str, Any] = _close(schema)
    if definitions:
        result["$defs"] = {name: each if name in shared else _close(each) for name, each in definitions.items()}
    return result


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, Any] = dict(schema)
    if _shares_its_place(schema):
        return result
    for key in _ONE_SCHEMA:
        if key in schema:
            result[key] = _close(schema[key])
    for key in _SCHEMAS:
        if key in schema:
            result[key] = [_close(each) for each in schema[key]]
    for key in _NAMED_SCHEMAS:
        if key in schema:
            result[key] = {name: _close(each) for name, each in schema[key].items()}
    names = schema.get("properties")
    if names is not None and names.keys() >= set(schema.get("required", ())) and not any(map(schema.get, _OPENING)):
        result.setdefault("additionalProperties", False)
    return result


def _shares_its_place(schema: Mapping[str, Any]) -> bool:
    """Whether several schemas speak of the same value here."""
    combining = [key for key in _COMBINING if key in schema]
    if not combining:
        return False
    return len(combining) > 1 or len(schema.get("allOf", ())) > 1 or any(key in schema for key in _STRUCTURE)


def _shared_definitions(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> set[str]:
    """Definitions that share a place with something, and those that they refer to."""
    found: set[str] = set()
    waiting = [each for whole in (schema, *definitions.values()) for each in _shared_places(whole)]
    while waiting:
        for reference in _references(waiting.pop()):
            name = reference.removeprefix("#/$defs/")
            if name not in found:
                found.add(name)
                waiting.append(definitions[name])
    return found


def _shared_places(schema: Any) -> Iterator[Any]:
    if isinstance(schema, Mapping) and _shares_its_place(schema):
        yield schema
        return
    for child in _children(schema):
        yield from _shared_places(child)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping) and "$ref" in schema:
        yield schema["$ref"]
    for child in _children(schema):
        yield from _references(child)


def _children(schema: Any) -> Iterator[Any]:
    """The schemas right within this one, definitions aside."""
    if not isinstance(schema, Mapping):
        return
    yield from (schema[key] for key in _ONE_SCHEMA if key in schema)
    for key in _SCHEMAS:
        yield from schema.get(key, ())
    for key in _NAMED_SCHEMAS:
        yield from schema.get(key, {}).values()
