"""What JSON allows and an honest server should not take: an object with a key twice, and nesting without end."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np

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
    finder = _DuplicateFinder()
    with contextlib.suppress(ValueError):
        json.loads(body, object_pairs_hook=finder.look_at)
        finder.check()


def is_nested_deeper(body: bytes, limit: int) -> bool:
    """Whether objects and arrays are nested more than ``limit`` levels deep.

    A few passes of C speed over the body, whatever it holds: without escapes, strings are what stands between quotes;
    the depth is the highest running sum of the brackets outside.
    """
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    outside = plain.translate(_BRACKETS, _NEITHER_QUOTE_NOR_BRACKET).split(b'"')[::2]
    brackets = np.frombuffer(b"".join(outside), dtype=np.int8)
    if brackets.size <= limit:
        return False
    steps = np.where(brackets == ord("["), np.int32(1), np.int32(-1))
    return bool(np.cumsum(steps, dtype=np.int32).max() > limit)


class _DuplicateFinder:
    """Sees every object of a body, the innermost first, so the last one is the body itself."""

    def __init__(self) -> None:
        self._num_objects = 0
        self._found: tuple[str, int] | None = None
        """The first key that stands twice, and the number of its object."""

    def look_at(self, pairs: list[tuple[str, Any]]) -> None:
        self._num_objects += 1
        if self._found is None and len(dict(pairs)) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._found = (key, self._num_objects)
                    return
                seen.add(key)

    def check(self) -> None:
        if self._found is not None:
            key, number = self._found
            path = key if number == self._num_objects else None
            raise InvalidRequest(f"The key {key[:64]!r} stands twice in one object.", path and path[:64])
