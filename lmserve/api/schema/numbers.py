"""Numbers as clients write them."""

from __future__ import annotations

from typing import Annotated

import msgspec

from lmserve.errors import InvalidRequest

Int = Annotated[int | float | None, msgspec.Meta(extra={"integer": True})]
"""A whole number; some clients write 100.0."""


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
