"""``GET /openapi.json``: the API described by what parses and answers it (OpenAPI 3.1, JSON Schema 2020-12)."""

from __future__ import annotations

import re
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from lmserve import __version__
from lmserve.api.body import IGNORED_HEADER
from lmserve.api.middleware import OPEN_PATHS, REQUEST_ID_HEADER
from lmserve.api.schema.errors import ErrorAnswer
from lmserve.api.schema.fields import Field, Treatment, table

_JSON = "application/json"
_EVENTS = "text/event-stream"
_HEADERS = {
    REQUEST_ID_HEADER: {"description": "The client's, if it sent a sane one", "schema": {"type": "string"}},
    IGNORED_HEADER: {"description": "Fields of the body without effect, if any", "schema": {"type": "string"}},
}
_IN_PATH = re.compile(r"\{(\w+)(?::path)?\}")
_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path: how it is called, and what it takes and gives."""

    method: str
    path: str
    """As Starlette writes it."""
    endpoint: Callable[[Request], Awaitable[ASGIApp]]
    summary: str
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    """``ErrorAnswer``: it never gives another one."""
    other_answer: type[msgspec.Struct] | None = None
    """To bodies that ask for something else."""
    chunk: type[msgspec.Struct] | None = None
    """What one event of a stream holds."""
    query: Mapping[str, str] | None = None
    """Parameters of the query, each with what it does."""
    statuses: Mapping[int, str] | None = None
    """Other answers of the same shape."""


class OpenApiEndpoint:
    """Owns the document."""

    def __init__(self, operations: Sequence[Operation], *, with_keys: bool) -> None:
        self._document = msgspec.json.encode(openapi(operations, with_keys=with_keys))

    async def document(self, _: Request) -> Response:
        return Response(self._document, media_type=_JSON)


def openapi(operations: Sequence[Operation], *, with_keys: bool) -> dict[str, Any]:
    """The document. ``with_keys``: the server asks for one."""
    answers = {kind for o in operations for kind in (o.answer, o.other_answer, o.chunk) if kind is not None}
    _, components = msgspec.json.schema_components(_by_name({*answers, ErrorAnswer}), ref_template=_REF)
    bodies = {o.body for o in operations if o.body is not None}
    components |= {body.__name__: body_schema(body) for body in _by_name(bodies)}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "lmserve", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"header": []}]
    return document


def body_schema(body: type[msgspec.Struct]) -> dict[str, Any]:
    """A request body, from its part of the table of fields. Keys that it does not name may come, and are reported."""
    hints = typing.get_type_hints(body)
    rows = table(body)
    return {
        "type": "object",
        "properties": {name: _field(row, hints[name]) for name, row in rows.items()},
        "required": [name for name, row in rows.items() if row.required],
    }


def _field(row: Field, kind: Any) -> dict[str, Any]:
    description = row.help
    for label, text in (("Allowed", row.allowed), ("Default", row.default)):
        description += f". {label}: {text}" if text else ""
    if row.treatment is Treatment.IGNORED:
        return {"description": f"Ignored, and reported in x-lmserve-ignored: {row.help}"}
    if row.treatment is Treatment.REFUSED:
        return {"description": f"Refused: {row.help}", "enum": [None, *row.harmless]}
    schema: dict[str, Any] = {"type": ["integer", "null"]}
    if row.schema is not None:
        schema = dict(row.schema)
    elif row.kind != "integer":
        schema = msgspec.json.schema(kind)
    if row.bounds is not None:
        schema["exclusiveMinimum" if row.bounds.low_open else "minimum"] = row.bounds.low
        schema["maximum"] = row.bounds.high
    return {**schema, "description": description}


def _operation(operation: Operation) -> dict[str, Any]:
    content = {}
    if operation.answer is not None:
        kinds = [kind for kind in (operation.answer, operation.other_answer) if kind is not None]
        content[_JSON] = {"schema": _ref(kinds[0]) if len(kinds) == 1 else {"anyOf": [_ref(kind) for kind in kinds]}}
    if operation.chunk is not None or operation.answer is None:
        content[_EVENTS] = {"schema": _event(operation.chunk)}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method.lower()}_{_identifier(operation.path)}",
        "responses": {
            "200": {"description": "The answer", "headers": _HEADERS, "content": content},
            **{
                str(status): {"description": text, "content": content}
                for status, text in (operation.statuses or {}).items()
            },
            "default": {"description": "An error", "content": {_JSON: {"schema": _ref(ErrorAnswer)}}},
        },
    }
    if operation.answer is ErrorAnswer:
        del described["responses"]["200"]
    if operation.path in OPEN_PATHS:
        described["security"] = []
    parameters = _parameters(operation)
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {_JSON: {"schema": _ref(operation.body)}}}
    return described


def _event(chunk: type[msgspec.Struct] | None) -> dict[str, Any]:
    """One server-sent event. ``chunk``: what its data holds; None: it is said elsewhere, and there is no end mark."""
    held: dict[str, Any] = {"type": "string", "contentMediaType": _JSON}
    data = held if chunk is None else {"anyOf": [{**held, "contentSchema": _ref(chunk)}, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
        for name, text in (operation.query or {}).items()
    ]
    parameters += [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)(?::path)?}", operation.path)
    ]
    return parameters


def _by_name(kinds: set[type[msgspec.Struct]]) -> list[type[msgspec.Struct]]:
    return sorted(kinds, key=lambda kind: kind.__name__)


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _identifier(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path).strip("_")
