"""When devices are looked at: regularly while something runs or loads, else when somebody wants to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from lmserve.models.entry import ModelEntry
from lmserve.models.usage import UsageReader, WorkerUsage

LOOK_SECONDS = 2.0
"""Between two looks while something runs, and the age of a figure that is still good."""


class UsageWatch:
    """Keeps ``ModelEntry.usage`` new."""

    def __init__(self, entries: Callable[[], Sequence[ModelEntry]], reader: UsageReader | None = None) -> None:
        self._entries = entries
        self._reader = reader or UsageReader()
        self._looked = float("-inf")
        self._turn = asyncio.Lock()

    async def look(self, max_age: float = LOOK_SECONDS) -> None:
        """Looks, unless that was done less than ``max_age`` seconds ago and nobody came since. In a thread: a driver
        may be slow."""
        async with self._turn:
            came = any(entry.worker is not None and entry.usage is None for entry in self._entries())
            if time.monotonic() - self._looked < max_age and not came:
                return
            workers = {entry: watched for entry in self._entries() if (watched := entry.watched) is not None}
            found: Mapping[int, WorkerUsage] = await asyncio.to_thread(self._reader.read, list(workers.values()))
            for entry, before in workers.items():
                if (watched := entry.watched) is not None and watched.pid == before.pid:
                    entry.usage = found.get(before.pid)
            self._looked = time.monotonic()

    async def run(self, tell: Callable[[Sequence[ModelEntry]], None]) -> None:
        """For ever: looks while a model loads or is used, once more afterwards, and tells of the loaded and loading
        ones that there are figures of."""
        was_busy = False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            is_busy = any(entry.is_busy for entry in self._entries())
            if is_busy or was_busy:
                await self.look(LOOK_SECONDS / 2)
                tell([entry for entry in self._entries() if entry.usage is not None])
            was_busy = is_busy
