"""What may stand in a schema as a value: numbers, texts and JSON that the grammar can spell exactly."""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, TypeGuard

from lmserve.errors import InvalidRequest

MAX_VALUE_DEPTH = 16
"""Levels of arrays and objects within one value of `const` or `enum`."""
MAX_NUMBER = 2**53
"""Above it a number and its neighbour are one to whoever reads JSON's numbers as doubles; the grammar's engine does."""
MIN_NUMBER = 1e-22
"""The smallest number that is not 0."""
MAX_DIGITS = 15
"""Of a fraction. With more, or more than 22 decimals, the engine's reader of JSON may take it for its neighbour."""
_MAX_DECIMALS = 22

_UNSPELLABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
"""JSON has these as `\\u` escapes only, which no grammar of ours allows: an escaped name would dodge its own schema."""


def quoted(path: str, name: str) -> str:
    """The path of a member; a long name is cut, as it comes back in an error."""
    return f"{path}.{name if len(name) <= 64 else name[:61] + '...'}"


def check_text(text: str, path: str) -> None:
    """Refuses a text that no output can hold.

    Raises:
        InvalidRequest: it has a control character without a short escape, or half a surrogate pair.
    """
    if found := _UNSPELLABLE.search(text):
        raise InvalidRequest(f"{path} holds the character U+{ord(found[0]):04X}, which no output can hold.", path)


def is_number(value: object) -> TypeGuard[int | float]:
    """A number, in JSON's sense: `true` is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(value: object, path: str) -> int | float:
    """The number, as an integer where it is one.

    Raises:
        InvalidRequest: it is no number, or beyond what the grammar can spell exactly.
    """
    if not is_number(value) or not math.isfinite(value):
        raise InvalidRequest(f"{path} must be a finite number.", path)
    if abs(value) > MAX_NUMBER:
        raise InvalidRequest(f"{path} must be within ±2^53: beyond it numbers are not exact.", path)
    if value != 0 and abs(value) < MIN_NUMBER:
        raise InvalidRequest(f"{path} is nearer to 0 than {MIN_NUMBER}, the limit.", path)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def inside(bound: int | float, *, is_least: bool, is_exclusive: bool) -> int | float:
    """An inclusive bound in few enough digits, at the bound or on its inner side.

    An exclusive bound cannot stay: `9.99…9` is below 10 as a text, and is 10 for whoever parses it.
    """
    if isinstance(bound, int) and not is_exclusive:
        return bound
    exact = Decimal(repr(bound))
    unit = Decimal(1).scaleb(
        min(0, max(exact.adjusted() + 1 - MAX_DIGITS, -_MAX_DECIMALS)) if exact else -_MAX_DECIMALS
    )
    rounded = (exact / unit).to_integral_value(ROUND_CEILING if is_least else ROUND_FLOOR) * unit
    if is_exclusive and rounded == exact:
        rounded += unit if is_least else -unit
    return int(rounded) if rounded == rounded.to_integral_value() else float(rounded)


def check_value(value: object, path: str, depth: int = 1) -> Any:
    """A value of `const` or `enum` as the grammar shall spell it: whole numbers are written as integers.

    Raises:
        InvalidRequest: some part of it cannot be spelt, or it nests too deep.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_text(value, path)
        return value
    if isinstance(value, list | dict) and depth > MAX_VALUE_DEPTH:
        raise InvalidRequest(f"{path} nests deeper than {MAX_VALUE_DEPTH} levels, the limit for values.", path)
    if isinstance(value, list):
        return [check_value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        for name in value:
            check_text(name, quoted(path, name))
        return {name: check_value(item, quoted(path, name), depth + 1) for name, item in value.items()}
    number = check_number(value, path)
    digits = Decimal(repr(number)).as_tuple()
    if isinstance(number, float) and (len(digits.digits) > MAX_DIGITS or int(digits.exponent) < -_MAX_DECIMALS):
        raise InvalidRequest(
            f"{path} has more than {MAX_DIGITS} digits or {_MAX_DECIMALS} decimals, the limit for a fraction.", path
        )
    return number
