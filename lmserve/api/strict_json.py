"""What JSON allows and an honest server should not take: an object with a key twice, and nesting without end."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from lmserve.errors import InvalidRequest

_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NEITHER_QUOTE_NOR_BRACKET = bytes(set(range(256)) - set(b'"[]{}'))


def check_json(body: bytes, max_nesting: int) -> None:
    """Refuse what is ambiguous or too deep. What is no JSON at all is the decoder's to refuse.

    Raises:
        InvalidRequest: a key stands twice in one object, or objects and arrays are nested more than ``max_nesting``
            levels deep.
    """
    if is_nested_deeper(body, max_nesting):
        raise InvalidRequest(f"The body is nested too deeply; the limit is {max_nesting} levels.")
    with contextlib.suppress(ValueError):
        json.loads(body, object_pairs_hook=_without_duplicates)


def is_nested_deeper(body: bytes, limit: int) -> bool:
    """Whether objects and arrays are nested more than ``limit`` levels deep.

    A few passes of C speed over the body, whatever it holds: without escapes, strings are what stands between quotes;
    of the brackets outside, each pass takes the innermost pairs away.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    outside = plain.translate(_BRACKETS, _NEITHER_QUOTE_NOR_BRACKET).split(b'"')[::2]
    brackets = b"".join(outside)
    for _ in range(limit):
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    # What no pass can take away is unbalanced, and no JSON; it counts as deep only if it goes down that far.
    return b"[]" in brackets or brackets.count(b"[") > limit


def _without_duplicates(pairs: list[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequest(f"The key {twice[:64]!r} stands twice in one object.", twice[:64])
