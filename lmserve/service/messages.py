"""Chat messages as clients write them, made into what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmserve.errors import InvalidRequest, UnsupportedField

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_NESTING = 64
"""Levels of objects and arrays within one message."""


def normalize_messages(messages: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Check the messages, join text parts with newlines, and rename roles that ``template`` does not mention.

    ``developer`` becomes ``system`` and ``function`` becomes ``tool``. Absent content becomes the empty string. Keys of
    which we know nothing (a model's template may) are passed on. ``arguments`` of tool calls, JSON text on the wire,
    become objects, which is what templates expect.

    Raises:
        InvalidRequest: ``param`` is the path of the part at fault.
        UnsupportedField: a part that is no text.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message.", "messages")
    renamed = {
        role: newer
        for role, newer in (("developer", "system"), ("function", "tool"))
        if f"'{role}'" not in template and f'"{role}"' not in template
    }
    return [_normalize(message, f"messages[{i}]", renamed) for i, message in enumerate(messages)]


def _normalize(message: dict[str, Any], path: str, renamed: dict[str, str]) -> dict[str, Any]:
    check_nesting(message, path)
    role = message.get("role")
    if role is None:
        raise InvalidRequest(f"{path}.role is required.", f"{path}.role")
    if role not in ROLES:
        raise InvalidRequest(f"{path}.role must be one of {', '.join(ROLES)}.", f"{path}.role")
    normalized = {key: value for key, value in message.items() if value is not None}
    normalized["role"] = renamed.get(role, role)
    normalized["content"] = _text(message.get("content"), f"{path}.content")
    if "function_call" in normalized and "tool_calls" not in normalized:  # how calls were written before tools
        normalized["tool_calls"] = [{"type": "function", "function": normalized.pop("function_call")}]
    if "tool_calls" in normalized:
        normalized["tool_calls"] = _tool_calls(normalized["tool_calls"], f"{path}.tool_calls")
    return normalized


def _text(content: object, path: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{path} must be a string or an array of parts.", path)
    return "\n".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(content))


def _part_text(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InvalidRequest(f"{path} must be an object with a type.", path)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{path}.type is required and must be a string.", f"{path}.type")
    if kind not in ("text", "refusal"):
        raise UnsupportedField(f"{path} is of type {kind!r}, but this model reads text only.", path)
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"{path}.{kind} is required and must be a string.", f"{path}.{kind}")
    return text


def _tool_calls(calls: object, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{path} must be an array.", path)
    return [_tool_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise InvalidRequest(f"{path} must be an object.", path)
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}.function must be an object with a name.", f"{path}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:  # a model wrote it, and may have written it badly: it is shown as it was
            return call
        function = {**function, "arguments": arguments}
    return {**call, "function": function}


def check_nesting(value: object, path: str) -> None:
    """Refuse what templates, which walk it recursively, could not bear."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise InvalidRequest(f"{path} is nested more than {MAX_NESTING} levels deep.", path)
