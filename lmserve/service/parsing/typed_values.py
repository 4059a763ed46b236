"""JSON values from text whose type only the tool's schema tells."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

from lmserve.service.tools import Tool

_MATCHES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
}
_MAX_DEPTH = 8
"""Of unions within unions."""


def json_text(value: Any) -> str:
    """A value as JSON, which UTF-8 can hold. Raises ValueError or TypeError where JSON cannot say it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which the model has written as an escape
        return json.dumps(value, allow_nan=False)
    return text


def python_literal(text: str) -> Any:
    """The value of a Python literal; nothing is run. Raises ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in strings, which are the model's affair
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError("no literal") from error


def parameter_types(tool: Tool, key: str) -> frozenset[str]:
    """What JSON Schema types a tool's parameter may have. Empty: any."""
    properties = tool.parameters.get("properties")
    return _types(properties.get(key), _MAX_DEPTH) if isinstance(properties, dict) else frozenset()


def typed_json(raw: str, types: frozenset[str]) -> str:
    """A value that a model wrote without quotes, as JSON of one of the types, if it can be; as a string, if not."""
    if types == {"string"}:
        return json_text(raw)
    value = _read(raw, types)
    others = types - {"string"}
    if value is not raw and (not others or any(_MATCHES[name](value) for name in others)):
        return json_text(value)
    return json_text(raw)


def _read(raw: str, types: frozenset[str]) -> Any:
    """The value that the text spells, as JSON or, where the schema says what it is, as Python; the text, if neither."""
    try:
        value = json.loads(raw, parse_constant=_refuse)
        return value if not isinstance(value, float) or math.isfinite(value) else raw
    except (ValueError, RecursionError):
        pass
    if not types - {"string"}:
        return raw
    lowered = raw.strip().lower()
    if "boolean" in types and lowered in ("true", "false"):
        return lowered == "true"
    if "null" in types and lowered in ("null", "none"):
        return None
    if raw.lstrip()[:1] in ("{", "["):
        try:
            value = python_literal(raw)
            json_text(value)
            return value
        except (ValueError, TypeError, RecursionError):
            pass
    return raw


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _types(schema: Any, depth: int) -> frozenset[str]:
    if not isinstance(schema, dict) or depth == 0:
        return frozenset()
    declared = schema.get("type")
    if isinstance(declared, str):
        declared = [declared]
    if isinstance(declared, list):
        names = {name for name in declared if name == "string" or name in _MATCHES}
        return frozenset(names | ({"null"} if schema.get("nullable") is True else set()))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return frozenset({"string"})
    for union in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(union), list):
            found = [_types(choice, depth - 1) for choice in choices]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()
