"""The gate that a client's JSON Schema passes before it is a grammar: what is not enforced is refused, by its path.

The grammar's engine ignores what it does not know, and approximates some of what it does. So this is an allow-list, and
what comes out is rewritten where the engine would take texts that a validator refuses. The promise: **every text that
the grammar accepts is valid under the client's schema.** The grammar may accept less (a fixed order of properties, `5`
and not `5.0`, ASCII digits for `\\d`).

Documented gap: an unbounded `number` may be too large for a double (`1e400`), as JSON allows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lmserve.errors import InvalidRequest
from lmserve.grammar.finite import has_finite_value
from lmserve.grammar.keywords import KeywordReader, Place
from lmserve.grammar.references import References

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_BYTES = 256 * 1024
"""Of the schema as JSON, in UTF-8."""

JSON_OPTIONS: JsonCompileOptions = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\t]{1,8}",
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
}
"""How llguidance shall read an enforceable schema: bounded blanks, and no second spelling of a property's name."""

_DIALECTS = {
    "http://json-schema.org/draft-04/schema": True,
    "http://json-schema.org/draft-06/schema": True,
    "http://json-schema.org/draft-07/schema": True,
    "https://json-schema.org/draft/2019-09/schema": True,
    "https://json-schema.org/draft/2020-12/schema": False,
}
"""What `$schema` may say, and whether an array of `items` is one schema per place there."""


def enforceable(schema: object, path: str) -> dict[str, Any]:
    """The schema as llguidance shall enforce it; ``path`` is where the client wrote it.

    Raises:
        InvalidRequest: it has what is not enforced, is malformed, too large, or no finite value satisfies it.
            `param` is the path of the keyword at fault, e.g. ``response_format.json_schema.schema.properties.a.not``.
    """
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{path} must be a JSON Schema: an object.", path)
    if schema is False:
        raise InvalidRequest(f"{path} is false: no value satisfies it.", path)
    if schema is True:
        return {}
    _check_size(schema, path)
    references = References(path)
    reader = KeywordReader(references, _arrays_of_items(schema, path))
    cleaned = reader.read(schema, Place((), path, 1))
    assert isinstance(cleaned, dict)  # a boolean was dealt with above
    references.resolve()
    reader.tell_branches_apart()
    if not has_finite_value(cleaned, references.targets):
        raise InvalidRequest(f"{path}: no finite value satisfies it. Is there a recursion without an end?", path)
    return references.with_definitions(cleaned)


def _check_size(schema: dict[str, Any], path: str) -> None:
    try:
        size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except RecursionError:
        raise InvalidRequest(f"{path} nests too deep.", path) from None
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"{path} has {size:,} bytes, the limit is {MAX_SCHEMA_BYTES:,}.", path)


def _arrays_of_items(schema: dict[str, Any], path: str) -> bool | None:
    """Whether the dialect has arrays of `items` (True), has `prefixItems` (False), or is not named (None: either)."""
    dialect = schema.get("$schema")
    if dialect is None:
        return None
    known = _DIALECTS.get(dialect.rstrip("#")) if isinstance(dialect, str) else None
    if known is None:
        names = ", ".join(_DIALECTS)
        raise InvalidRequest(f"{path}.$schema must be one of {names}.", f"{path}.$schema")
    return known
