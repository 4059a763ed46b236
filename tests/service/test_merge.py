from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from lmserve.service.merge import merge


class Source:
    """Yields its name ``count`` times, then raises ``error`` if there is one."""

    def __init__(self, name: str, count: int, error: Exception | None = None) -> None:
        self.name = name
        self.count = count
        self.error = error
        self.closed = False

    async def items(self) -> AsyncGenerator[str, None]:
        try:
            for _ in range(self.count):
                await asyncio.sleep(0)
                yield self.name
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def test_all_items_of_all() -> None:
    async def scenario() -> list[str]:
        return [item async for item in merge([Source("a", 3).items(), Source("b", 1).items()])]

    items = asyncio.run(scenario())
    assert sorted(items) == ["a", "a", "a", "b"]
    assert items.index("b") < 3, "they take turns"


def test_an_exception_ends_all() -> None:
    endless, failing = Source("a", 10**9), Source("b", 1, ValueError("no"))

    async def scenario() -> None:
        async for _ in merge([endless.items(), failing.items()]):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(scenario())
    assert endless.closed


def test_closing_closes_all() -> None:
    sources = [Source("a", 10**9), Source("b", 10**9)]

    async def scenario() -> None:
        async with aclosing(merge([source.items() for source in sources])) as merged:
            async for _ in merged:
                break
        assert all(source.closed for source in sources)

    asyncio.run(scenario())


def test_a_slow_reader_holds_the_generators_up() -> None:
    made: list[str] = []

    async def many(name: str) -> AsyncGenerator[str, None]:
        for i in range(100):
            made.append(f"{name}{i}")
            yield made[-1]

    async def main() -> None:
        items = merge([many("a"), many("b")])
        seen = [await anext(items)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(made) <= len(seen) + 4, "two of each generator ahead, at most"
        seen += [item async for item in items]
        assert sorted(seen) == sorted(made)
        assert len(made) == 200

    asyncio.run(main())
