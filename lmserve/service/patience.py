"""How long a request waits for the first news of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

from lmserve.errors import FirstTokenTimeout

T = TypeVar("T")
RETRY_AFTER_TIMEOUT = 5.0


async def first_in_time(outputs: AsyncGenerator[T, None], seconds: float) -> T:
    """The generator's first item; there has to be one.

    Raises:
        FirstTokenTimeout: it did not come in time. The generator can be closed.
    """
    # Not wait_for: before Python 3.12 it loses a cancel that comes in the same moment as the item.
    first = asyncio.ensure_future(anext(outputs))
    try:
        done, _ = await asyncio.wait({first}, timeout=seconds)
    finally:
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    if not done:
        message = f"The request had no first token after {seconds:g} seconds: the server has too much to do."
        raise FirstTokenTimeout(message, RETRY_AFTER_TIMEOUT)
    return first.result()
