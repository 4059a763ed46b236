"""Several asynchronous generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all, as they come. The first exception ends all; closing this closes all.

    A slow reader holds the generators up: all together are at most two items for each of them ahead of it.
    """
    items: asyncio.Queue[tuple[T | None, BaseException | None, bool]] = asyncio.Queue(len(generators))

    async def drain(generator: AsyncGenerator[T, None]) -> None:
        try:
            async for item in generator:
                await items.put((item, None, False))
        except Exception as error:
            await items.put((None, error, False))
        else:
            await items.put((None, None, True))
        finally:
            await generator.aclose()

    tasks = [asyncio.create_task(drain(generator)) for generator in generators]
    running = len(tasks)
    try:
        while running:
            item, error, ended = await items.get()
            if error is not None:
                raise error
            if ended:
                running -= 1
            elif item is not None:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
