"""Reading a request body: bytes -> checked struct, and the names of what is ignored."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from lmserve.api.schema.fields import Treatment, table
from lmserve.api.settings import ApiSettings
from lmserve.api.strict_json import check_json
from lmserve.errors import InvalidRequest, UnsupportedField

T = TypeVar("T", bound=msgspec.Struct)

IGNORED_HEADER = "x-lmserve-ignored"
MAX_IGNORED_NAMES = 32
INLINE_BYTES = 1 << 16
"""A longer body is read in a thread: other requests' tokens go out meanwhile."""

_WRONG_TYPE = re.compile(r"Expected `(?P<expected>.+?)`(?:, got `(?P<got>.+?)`)?(?: - at `\$\.?(?P<path>.*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>.+?)`(?: - at `\$\.?(?P<path>.*)`)?")
_OTHER = re.compile(r"(?P<message>.*?)(?: - at `\$\.?(?P<path>.*)`)?")
_JSON_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


async def read_request(request: Request, kind: type[T], settings: ApiSettings) -> tuple[T, list[str]]:
    """The body as a checked struct, and the names of fields that have no effect. Raises as the two steps do."""
    body = await read_body(request, settings.max_body_bytes, settings.body_seconds)

    def read() -> tuple[T, list[str]]:
        check_json(body, settings.max_json_nesting)
        return parse_body(body, kind)

    return read() if len(body) <= INLINE_BYTES else await asyncio.to_thread(read)


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, counted while it comes.

    Raises:
        HTTPException: 415 for another media type than JSON, 413 for more than ``limit`` bytes, 408 if it is not there
            after ``seconds``.
    """
    # A web page may send other types to any server without asking; JSON it may not. So this is more than tidiness.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"The content-type must be application/json, not {media_type[:64]!r}.")
    too_large = HTTPException(413, f"The body is larger than {limit} bytes.", {"connection": "close"})
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large

    async def read() -> bytes:
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        late = f"The body was not there after {seconds:g} seconds."
        raise HTTPException(408, late, {"connection": "close"}) from None


def parse_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The struct, and the names of fields that have no effect.

    Raises:
        InvalidRequest: malformed JSON or a wrong type; ``param`` is the path as the client wrote it.
        UnsupportedField: a refused field that asks for something.
    """
    try:
        fields = _decode_fields(body)
        ignored = _fields_without_effect(fields, kind)
        return msgspec.json.decode(body, type=kind), ignored
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8: byte {error.start} of a text.") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


@contextmanager
def in_clients_words(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error that blames a parameter blames it by the name that the client used: our name -> theirs."""
    try:
        yield
    except InvalidRequest as error:
        theirs = names.get(error.param or "")
        if theirs is None or error.param is None:
            raise
        raise InvalidRequest(str(error).replace(error.param, theirs, 1), theirs) from None


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that reports fields without effect; empty if there are none."""
    if not names:
        return {}
    shown = [quote(name[:64], safe=".[]-_") for name in names[:MAX_IGNORED_NAMES]]
    return {IGNORED_HEADER: ", ".join(shown)}


def _fields_without_effect(fields: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct]) -> list[str]:
    rows, names = table(kind), []
    for name, raw in fields.items():
        row = rows.get(name)
        if row is not None and row.treatment is Treatment.HONOURED:
            continue
        value: Any = msgspec.json.decode(raw)
        if row is not None and row.treatment is Treatment.REFUSED:
            if not row.asks_for_nothing(value):
                raise UnsupportedField(f"{name} is not supported: {row.help}.", name)
        elif value is not None:
            names.append(name)
    return names


def _invalid(message: str) -> InvalidRequest:
    """msgspec's message in the client's words."""
    if match := _WRONG_TYPE.fullmatch(message):
        path = match["path"] or None
        got = f", not {_json_name(match['got'])}" if match["got"] else ""
        return InvalidRequest(f"{path or 'The body'} must be {_json_names(match['expected'])}{got}.", path)
    if match := _MISSING.fullmatch(message):
        path = f"{match['path']}.{match['name']}" if match["path"] else match["name"]
        return InvalidRequest(f"{path} is required.", path)
    match = _OTHER.fullmatch(message)
    assert match is not None, "it matches anything"
    path = match["path"] or None
    return InvalidRequest(f"{path or 'The body'}: {match['message']}.", path)


def _json_names(expected: str) -> str:
    """``int | float | null`` -> ``number``. null may stand for any optional field, so it goes without saying."""
    kinds = [kind for kind in expected.split(" | ") if kind != "null"]
    if "float" in kinds and "int" in kinds:
        kinds.remove("int")
    return " or ".join(map(_json_name, kinds))


def _json_name(kind: str) -> str:
    return _JSON_NAMES.get(kind, kind)
