"""Chat messages as clients write them, made into what chat templates read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lmserve.errors import InvalidRequest, UnsupportedField
from lmserve.images.job import Detail

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_NESTING = 64
"""Levels of objects and arrays within one message."""
_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""What must be a string, if it is there."""

PartStyle = Literal["text", "either", "parts"]
"""How a chat template reads contents: as text alone, as text or parts, as parts alone."""
DETAILS: tuple[Detail, ...] = get_args(Detail)
TEXT_ONLY = "this model reads text only"
"""Why it may have no images."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image that a message holds."""

    path: str
    """Of the field that has it, as the client wrote it."""
    url: str
    detail: Detail


@dataclass(frozen=True, slots=True)
class NormalizedChat:
    """Messages as templates read them, and the images whose places they hold, in this order."""

    messages: list[dict[str, Any]]
    images: list[ImagePart]


def normalize_messages(
    messages: Sequence[dict[str, Any]],
    template: str,
    style: PartStyle = "text",
    no_images: str | None = TEXT_ONLY,
) -> NormalizedChat:
    """Check the messages, and give each of their shapes one form.

    ``function``, as results were called before tools, becomes ``tool``, and ``developer`` becomes ``system`` where
    ``template`` does not mention it. Absent content becomes the empty string; a tool's may be a JSON value. Text parts
    are joined with newlines for a template that reads text alone. Keys of which we know nothing (a model's template
    may) are passed on. ``arguments`` of tool calls, JSON text on the wire, become objects; a text that is none stays.
    ``no_images``: why the model may have none; None if it may.

    Raises:
        InvalidRequest: ``param`` is the path of the part at fault.
        UnsupportedField: a part that the model cannot read.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message.", "messages")
    renamed = {"function": "tool"}
    if "'developer'" not in template and '"developer"' not in template:
        renamed["developer"] = "system"
    reader = _ContentReader(style, no_images)
    normalized = [_normalize(message, f"messages[{i}]", renamed, reader) for i, message in enumerate(messages)]
    return NormalizedChat(normalized, reader.images)


def _normalize(message: dict[str, Any], path: str, renamed: dict[str, str], reader: _ContentReader) -> dict[str, Any]:
    check_nesting(message, path)
    role = message.get("role")
    if role is None:
        raise InvalidRequest(f"{path}.role is required.", f"{path}.role")
    if role not in ROLES:
        raise InvalidRequest(f"{path}.role must be one of {', '.join(ROLES)}.", f"{path}.role")
    normalized = {key: value for key, value in message.items() if value is not None}
    for key in _TEXTS:
        if not isinstance(normalized.get(key, ""), str):
            raise InvalidRequest(f"{path}.{key} must be a string.", f"{path}.{key}")
    normalized["role"] = renamed.get(role, role)
    content = message.get("content")
    if normalized["role"] == "tool" and isinstance(content, (dict, int, float)):  # not OpenAI's, and found in the wild
        content = json.dumps(content, ensure_ascii=False)
    normalized["content"] = reader.read(content, f"{path}.content")
    if "function_call" in normalized:  # how calls were written before tools
        call = {"type": "function", "function": normalized.pop("function_call")}
        if not normalized.get("tool_calls"):
            normalized["tool_calls"] = [_tool_call(call, path, f"{path}.function_call")]
            return normalized
    if "tool_calls" in normalized:
        normalized["tool_calls"] = _tool_calls(normalized["tool_calls"], f"{path}.tool_calls")
    return normalized


class _ContentReader:
    """Reads contents, and collects the images that are in them."""

    def __init__(self, style: PartStyle, no_images: str | None) -> None:
        self.images: list[ImagePart] = []
        self._style = style
        self._no_images = no_images

    def read(self, content: object, path: str) -> str | list[dict[str, str]]:
        """In the template's style."""
        if content is None:
            content = ""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._style == "parts" else content
        if not isinstance(content, list):
            raise InvalidRequest(f"{path} must be a string or an array of parts.", path)
        parts = [self._part(part, f"{path}[{i}]") for i, part in enumerate(content)]
        return parts if self._style != "text" else "\n".join(part["text"] for part in parts)

    def _part(self, part: object, path: str) -> dict[str, str]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise InvalidRequest(f"{path} must be an object with a type.", path)
        kind = part.get("type")
        if not isinstance(kind, str):
            raise InvalidRequest(f"{path}.type is required and must be a string.", f"{path}.type")
        if kind == "image_url":
            return self._image(part, path)
        if kind not in ("text", "refusal"):
            reads = "text and images only" if self._no_images is None else "text only"
            raise UnsupportedField(f"{path} is of type {kind!r}, but this model reads {reads}.", path)
        text = part.get(kind)
        if not isinstance(text, str):
            raise InvalidRequest(f"{path}.{kind} is required and must be a string.", f"{path}.{kind}")
        return {"type": "text", "text": text}

    def _image(self, part: dict[str, Any], path: str) -> dict[str, str]:
        if self._no_images is not None:
            raise UnsupportedField(f"{path} is an image, but {self._no_images}.", path)
        if self._style == "text":
            raise UnsupportedField(f"{path} is an image, but the model's chat template has no place for one.", path)
        given = part.get("image_url")
        path = f"{path}.image_url"
        if isinstance(given, str):  # not OpenAI's shape, and found in the wild
            given = {"url": given}
        else:
            path += ".url"
        url = given.get("url") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(url, str):
            raise InvalidRequest(f"{path} is required and must be a string.", path)
        detail = given.get("detail") or "auto"
        if detail not in DETAILS:
            where = f"{path.removesuffix('.url')}.detail"
            raise InvalidRequest(f"{where} must be one of {', '.join(DETAILS)}.", where)
        self.images.append(ImagePart(path, url, detail))
        return {"type": "image"}


def _tool_calls(calls: object, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{path} must be an array.", path)
    return [_tool_call(call, f"{path}[{i}]", f"{path}[{i}].function") for i, call in enumerate(calls)]


def _tool_call(call: object, path: str, function_path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise InvalidRequest(f"{path} must be an object.", path)
    if not isinstance(call.get("id"), (str, type(None))):
        raise InvalidRequest(f"{path}.id must be a string.", f"{path}.id")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{function_path} must be an object with a name.", function_path)
    arguments = _arguments(function.get("arguments"), f"{function_path}.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(given: object, path: str) -> str | dict[str, Any]:
    """As an object; as it was if it is a text that is none: a model wrote it, and may have written it badly."""
    if given is None:
        return {}
    if isinstance(given, dict):
        return given
    if not isinstance(given, str):
        raise InvalidRequest(f"{path} must be a string of JSON, or an object.", path)
    try:
        value = json.loads(given) if given.strip() else {}
        json.dumps(value, ensure_ascii=False).encode()  # half a character, which an escape may be, is no text
    except ValueError:
        return given
    except RecursionError:
        raise _too_deep(path) from None
    check_nesting(value, path)
    if value is None:
        return {}
    return value if isinstance(value, dict) else given


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
    raise _too_deep(path)


def _too_deep(path: str) -> InvalidRequest:
    return InvalidRequest(f"{path} is nested more than {MAX_NESTING} levels deep.", path)
