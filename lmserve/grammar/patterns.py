"""Regular expressions of a schema: those that every reader takes alike, written so that no reader accepts less.

A pattern is read by the grammar's engine (Rust's syntax), by the client's validator (ECMA-262) and by Python's `re`
(`jsonschema`). Where they differ, a text would pass here and fail there: so only what they share is let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_CLASSES = "dDwWsS"
_ALL_SPACES = r"\t\n\x0B\x0C\r \u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"
_SURE = {"d": "0-9", "w": "A-Za-z0-9_", "s": _ALL_SPACES}
"""What every reader takes for a digit, a part of a word, a space: ECMA-262 knows ASCII's digits and letters alone."""
_POSSIBLE = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}_", "s": _ALL_SPACES + r"\x1C-\x1F\u0085\uFEFF"}
"""What any reader takes for one: Python all of Unicode's, and for spaces separators of ASCII too."""
_ESCAPED = r"[\\/.*+?()\[\]{}|^$\-tnrf]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}"
_TOKEN = re.compile(
    rf"""\\(?P<escape>[dDwWsS]|{_ESCAPED})
    |(?P<class>\[\^?(?:\\(?:[dDwWsS]|{_ESCAPED})|[^\\\[\]])+\])
    |(?P<group>\((?:\?:)?)
    |(?P<repeat>(?:[*+?]|\{{[0-9]{{1,5}}(?:,(?:[0-9]{{1,5}})?)?\}})\??)
    |(?P<anchor>[\^$])
    |(?P<plain>[)|.]|[^\\\[\](){{}}*+?|^$])""",
    re.VERBOSE | re.DOTALL,
)
_IN_CLASS = re.compile(rf"\\(?:[dDwWsS]|{_ESCAPED})|.", re.DOTALL)


@dataclass(frozen=True)
class Pattern:
    """A pattern for the grammar's engine; whether it names classes (``\\d``), and how often it says ``$``."""

    text: str
    has_classes: bool
    dollars: int


class PatternError(ValueError):
    """A pattern that not every reader takes, or not alike; the message is the end of a sentence about it."""


def read_pattern(pattern: str) -> Pattern:
    """The pattern as the grammar's engine shall have it.

    Raises:
        PatternError: it has a construct outside the shared ones, or is no regular expression at all.
    """
    parts: list[str] = []
    has_classes, dollars, can_repeat = False, 0, False
    for kind, text in _tokens(pattern):
        if kind == "repeat" and not can_repeat:
            raise PatternError(f"has {text!r} after what readers do not repeat alike (flags, anchors, repetitions)")
        has_classes = has_classes or (
            kind in ("escape", "class") and bool(re.search(r"(?<!\\)(?:\\\\)*\\[dDwWsS]", text))
        )
        dollars += text == "$"
        parts.append(_for_all_readers(kind, text))
        can_repeat = kind in ("escape", "class") or (kind == "plain" and text != "|")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"is not a regular expression: {error}") from None
    return Pattern("".join(parts), has_classes, dollars)


def before_a_last_newline(pattern: str) -> str:
    """What the pattern matches if ``$`` is before a text's last newline: in Python it is, in ECMA-262 it is not."""
    return "".join(r"\n$" if text == "$" else text for _, text in _tokens(pattern))


def _tokens(pattern: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(pattern):
        found = _TOKEN.match(pattern, at)
        if found is None:
            raise PatternError(
                f"has {pattern[at : at + 12]!r} at character {at}, which not all readers of regular expressions take "
                "alike (look-around, back references, flags, named groups, \\b and \\p are such)"
            )
        yield str(found.lastgroup), found[0]
        at = found.end()


def _for_all_readers(kind: str, text: str) -> str:
    if kind == "escape" and text[1] in _CLASSES:
        return f"[{_class_part(text, is_negated=False)}]"
    if kind == "class":
        return _class_for_all_readers(text)
    return r"[^\n\r\u2028\u2029]" if text == "." else text


def _class_part(part: str, is_negated: bool) -> str:
    """A part of a class: ``\\d`` and the like such that the whole class has only what is in it for every reader.

    In a negated class that is what may be excluded by any of them, in another what is surely included.
    """
    if len(part) == 1 or part[1] not in _CLASSES:
        return part
    is_complement = part[1].isupper()
    characters = (_POSSIBLE if is_complement != is_negated else _SURE)[part[1].lower()]
    return f"[^{characters}]" if is_complement else characters


def _class_for_all_readers(text: str) -> str:
    is_negated = text[1] == "^"
    parts = _IN_CLASS.findall(text[2 if is_negated else 1 : -1])
    for i, part in enumerate(parts):
        if part in ("&", "~", "|") and parts[i : i + 2] == [part, part]:
            raise PatternError(f"has {part * 2!r} in a class, which some readers take for an operation on sets")
        if part == "-" and 0 < i < len(parts) - 1 and _is_no_range(parts, i):
            raise PatternError("has a '-' in a class that is neither a range nor at an end; write \\-")
        if part == "-" and parts[i : i + 2] == ["-", "-"]:
            raise PatternError("has '--' in a class, which some readers take for an operation on sets")
    body = "".join(_class_part(part, is_negated) for part in parts)
    return f"[{'^' if is_negated else ''}{body}]"


def _is_no_range(parts: list[str], i: int) -> bool:
    """Whether the '-' at ``i`` stands beside a class, or after the end of a range."""
    beside_a_class = any(len(part) > 1 and part[1] in _CLASSES for part in (parts[i - 1], parts[i + 1]))
    return beside_a_class or (i >= 3 and parts[i - 2] == "-" and i - 2 > 0)
