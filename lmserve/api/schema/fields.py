"""The table of request fields, and how its rows are written.

A request body's struct is its part of the table: every field that OpenAI, LM Studio or lmserve documents for the
endpoint is a member, and its annotation says what is done with it. There are three ways for a field, and no fourth: it
is *honoured*; it is *ignored*, and reported in the header ``x-lmserve-ignored`` (as is every key that is no member at
all); it is *refused* by name, unless its value asks for nothing. ``table`` reads the rows back: the parser, the
documentation page, the OpenAPI document and the tests all go by them.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import msgspec

from lmserve.sampling_params import Range


class Treatment(str, Enum):
    """What is done with a field."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One row of the table."""

    name: str = ""
    kind: str = ""
    """Its type, as JSON calls it."""
    allowed: str = ""
    """What values it may have, where the type does not say it all."""
    bounds: Range | None = None
    default: str = ""
    treatment: Treatment
    help: str
    """What it does; of a refused or ignored field, why."""
    harmless: tuple[Any, ...] = ()
    """Of a refused field: values that ask for nothing. null always is one."""
    required: bool = False
    schema: Mapping[str, Any] | None = None
    """In JSON Schema, where the Python type says too little."""

    def asks_for_nothing(self, value: object) -> bool:
        return value is None or any(type(value) is type(same) and value == same for same in self.harmless)


def honoured(
    help: str,
    *,
    default: str = "",
    allowed: Range | str = "",
    kind: str = "",
    schema: Mapping[str, Any] | None = None,
) -> msgspec.Meta:
    """The annotation of a field with its documented meaning. ``kind``, ``schema``: where the type does not tell."""
    row = Field(
        kind=kind,
        allowed=str(allowed),
        bounds=allowed if isinstance(allowed, Range) else None,
        default=default,
        treatment=Treatment.HONOURED,
        help=help,
        schema=schema,
    )
    return msgspec.Meta(description=help, extra={"row": row})


def ignored(kind: str, why: str) -> msgspec.Meta:
    """The annotation of a field whose absence changes no answer."""
    return msgspec.Meta(description=why, extra={"row": Field(kind=kind, treatment=Treatment.IGNORED, help=why)})


def refused(kind: str, why: str, *harmless: Any) -> msgspec.Meta:
    """The annotation of a field whose absence would change the answer."""
    row = Field(kind=kind, treatment=Treatment.REFUSED, help=why, harmless=harmless)
    return msgspec.Meta(description=why, extra={"row": row})


@functools.cache
def table(body: type[msgspec.Struct]) -> Mapping[str, Field]:
    """The rows of one endpoint, by name, in the order of the struct."""
    hints = typing.get_type_hints(body, include_extras=True)
    required = {field.name for field in msgspec.structs.fields(body) if field.required}
    rows = {}
    for name in body.__struct_fields__:
        kind, *notes = typing.get_args(hints[name])
        extras = [note.extra or {} for note in notes]
        row: Field = next(extra["row"] for extra in extras if "row" in extra)
        is_integer = any(extra.get("integer") for extra in extras)
        named = row.kind or ("integer" if is_integer else kind_name(kind))
        rows[name] = replace(row, name=name, kind=named, required=name in required)
    return types.MappingProxyType(rows)


def kind_name(kind: Any) -> str:
    """A Python type as JSON calls it. null goes without saying: it may stand for any optional field."""
    if kind in _KINDS:
        return _KINDS[kind]
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(kind_name(argument) for argument in arguments if argument is not types.NoneType)
    origin = typing.get_origin(kind)
    assert origin in (list, dict), kind
    return f"array of {kind_name(arguments[0])}s" if origin is list else "object"


_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean"}
