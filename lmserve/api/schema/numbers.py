"""Numbers as clients write them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

import msgspec

from lmserve.errors import InvalidRequest

Int = Annotated[int | float | None, msgspec.Meta(extra={"integer": True})]
"""A whole number; some clients write 100.0."""

DURATION_PATTERN = r"^-?([0-9]+(\.[0-9]+)?|([0-9]+(\.[0-9]+)?(ms|s|m|h))+)$"
_UNITS: Mapping[str, float] = MappingProxyType({"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0})


def keep_alive_seconds(value: str | float) -> float:
    """Ollama's keep_alive in seconds; below 0 is for ever, infinity.

    Raises:
        InvalidRequest: it is none.
    """
    text = value.strip() if isinstance(value, str) else repr(float(value))
    if isinstance(value, str) and not re.fullmatch(DURATION_PATTERN, text):
        raise InvalidRequest("keep_alive must be a number of seconds, or a duration such as 5m.", "keep_alive")
    parts = re.findall(r"([0-9.]+)([a-z]*)", text.lstrip("-")) if isinstance(value, str) else []
    seconds = math.fsum(float(number) * _UNITS[unit] for number, unit in parts) if parts else abs(float(value))
    return math.inf if text.startswith("-") and seconds else seconds


def integer(value: int | float | None, param: str, low: int = -(2**63), high: int = 2**64 - 1) -> int | None:
    """The value as an int of at most 64 bits; None stays None.

    Raises:
        InvalidRequest: it is not whole, or out of range.
    """
    if value is None:
        return None
    if isinstance(value, float) and not value.is_integer():
        raise InvalidRequest(f"{param} must be an integer, got {value}.", param)
    if not low <= value <= high:
        raise InvalidRequest(f"{param} must be in [{low}, {high}].", param)
    return int(value)
