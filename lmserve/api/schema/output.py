"""What the output has to be, in the several ways in which clients say it."""

from __future__ import annotations

import json
from typing import Any, Protocol

from lmserve.errors import InvalidRequest
from lmserve.service.structure import Kind, OutputFormat

FORMAT_TYPES = ("text", "json_object", "json_schema", "json", "regex")
"""Of ``response_format``. ``json`` and ``regex`` with ``value`` are those of text-generation-inference."""
MAX_NAME_CHARACTERS = 64
_OBJECT: dict[str, Any] = {"type": "object"}
_EXTENSIONS: dict[str, Kind] = {"json": "json", "regex": "regex", "choice": "choice", "grammar": "lark"}


class OutputFields(Protocol):
    """The fields of a body that say it."""

    response_format: dict[str, Any] | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    structured_outputs: dict[str, Any] | None


def output_format(body: OutputFields) -> OutputFormat | None:
    """None if the output is free.

    Raises:
        InvalidRequest: malformed, or said twice.
    """
    said = [] if body.response_format is None else [_response_format(body.response_format, "response_format")]
    for name, kind in _EXTENSIONS.items():
        value = getattr(body, f"guided_{name}")
        if value is not None:
            said.append(
                OutputFormat(kind, _parsed(value, f"guided_{name}") if kind == "json" else value, f"guided_{name}")
            )
    if body.structured_outputs is not None:
        said += _structured_outputs(body.structured_outputs)
    asked = [output for output in said if output is not None]
    if len(asked) > 1:
        raise InvalidRequest(f"{asked[1].path} and {asked[0].path} exclude each other.", asked[1].path)
    return asked[0] if asked else None


def _response_format(given: dict[str, Any], path: str) -> OutputFormat | None:
    match given.get("type"):
        case "text":
            return None
        case "json_object" | "json":
            # A schema beside it is what some clients make of json_schema (huggingface_hub: value; others: schema).
            for key in ("value", "schema"):
                if given.get(key) is not None:
                    return OutputFormat("json", _parsed(given[key], f"{path}.{key}"), f"{path}.{key}")
            return OutputFormat("json", _OBJECT, path)
        case "json_schema":
            return _json_schema(given, path)
        case "regex":
            return OutputFormat("regex", given.get("value", given.get("pattern")), f"{path}.value")
    raise InvalidRequest(f"{path}.type must be one of {', '.join(FORMAT_TYPES)}.", f"{path}.type")


def _json_schema(given: dict[str, Any], path: str) -> OutputFormat:
    described = given.get("json_schema")
    if described is None and given.get("schema") is not None:  # flat, as some providers have it
        return OutputFormat("json", _parsed(given["schema"], f"{path}.schema"), f"{path}.schema")
    path = f"{path}.json_schema"
    if not isinstance(described, dict):
        raise InvalidRequest(f"{path} is required and must be an object.", path)
    name = described.get("name")
    if name is not None and not (isinstance(name, str) and len(name) <= MAX_NAME_CHARACTERS):
        raise InvalidRequest(
            f"{path}.name must be a string of at most {MAX_NAME_CHARACTERS} characters.", f"{path}.name"
        )
    strict = described.get("strict")
    if strict not in (None, True, False, "true", "false"):  # LM Studio's own examples have a string here
        raise InvalidRequest(f"{path}.strict must be a boolean.", f"{path}.strict")
    unknown = sorted(described.keys() - {"name", "description", "schema", "strict"})
    if unknown:
        raise InvalidRequest(f"{path}.{unknown[0]} is not known.", f"{path}.{unknown[0]}")
    schema = described.get("schema")
    return OutputFormat("json", _OBJECT if schema is None else schema, f"{path}.schema")


def _structured_outputs(given: dict[str, Any]) -> list[OutputFormat | None]:
    said: list[OutputFormat | None] = []
    for key, value in given.items():
        path = f"structured_outputs.{key}"
        if value is None or (key == "json_object" and value is False):
            continue
        if key == "json_object":
            if value is not True:
                raise InvalidRequest(f"{path} must be a boolean.", path)
            said.append(OutputFormat("json", _OBJECT, path))
        elif key in _EXTENSIONS:
            said.append(OutputFormat(_EXTENSIONS[key], _parsed(value, path) if key == "json" else value, path))
        else:
            raise InvalidRequest(f"{path} is not known; there are json, regex, choice, grammar, json_object.", path)
    return said


def _parsed(schema: object, path: str) -> object:
    """A schema may come as JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path} is no JSON: {error}.", path) from error
