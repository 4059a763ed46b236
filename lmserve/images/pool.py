"""The helper processes that look at images, and the files in which features wait for a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TypeVar

import psutil

from lmserve.errors import QueueFull
from lmserve.images import side_process
from lmserve.images.job import BadImage, ImageJob, ProcessedImage

T = TypeVar("T")
PREFIX = "lmserve-images-"
MEMORY_FOLDER = "/dev/shm"
MAX_FEATURE_BYTES = 4 * 2**30
"""Of all requests that run or wait."""
MAX_PROCESSES = 4


@dataclass(frozen=True)  # no slots: it is referred to weakly
class StoredImage:
    """A processed image, whose file lives as long as this does."""

    facts: ProcessedImage

    @property
    def file(self) -> str:
        return self.facts.file


class ImagePool:
    """Owns the helpers, which begin with the first image, and the folders of features, which end with the server.

    A helper that dies takes only the images with it that were being looked at: these are tried once more.
    """

    def __init__(self, processes: int = 0, max_bytes: int = MAX_FEATURE_BYTES) -> None:
        self._processes = processes or max(1, min(MAX_PROCESSES, (os.cpu_count() or 2) // 2))
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._folders: list[str] = []
        self._executor: ProcessPoolExecutor | None = None

    @property
    def num_bytes(self) -> int:
        """That features of living images take."""
        return self._num_bytes

    async def process(self, job: ImageJob) -> StoredImage:
        """The image's features, in a file. ``job.folders`` is filled in here.

        Raises:
            BadImage: it is none, or one that the model cannot look at.
            ProcessorError: the model has no processor that works here.
            QueueFull: the images of other requests take all the room.
        """
        job = replace(job, folders=self._make_folders())
        if self._num_bytes >= self._max_bytes:
            raise QueueFull(
                f"Images of requests that run or wait take {self._num_bytes} bytes, the limit is {self._max_bytes}."
            )
        try:
            facts = await self._run(side_process.process, job)
        except BrokenProcessPool:
            try:
                facts = await self._run(side_process.process, job)
            except BrokenProcessPool:
                raise BadImage("the process that looked at it died") from None
        image = StoredImage(facts)
        self._num_bytes += facts.num_bytes
        weakref.finalize(image, self._remove, facts.file, facts.num_bytes)
        return image

    async def prepare(self, path: str, *, trust_remote_code: bool, revision: str) -> None:
        """Has the helpers read a model's processor, so that its first image does not wait for that.

        Raises:
            ProcessorError: the model has none that works here.
        """
        reads = (self._run(side_process.prepare, path, trust_remote_code, revision) for _ in range(self._processes))
        with contextlib.suppress(BrokenProcessPool):  # whoever needs them next begins anew
            await asyncio.gather(*reads)

    def close(self) -> None:
        """Ends the helpers and removes the files."""
        self._end_helpers()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        executor = self._executor
        if executor is None:
            # Spawned: a forked child would hold the server's sockets and locks.
            executor = self._executor = ProcessPoolExecutor(
                self._processes, mp_context=get_context("spawn"), initializer=side_process.begin
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)
        except BrokenProcessPool:
            if self._executor is executor:
                self._end_helpers()
            raise

    def _end_helpers(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def _make_folders(self) -> tuple[str, ...]:
        if not self._folders:
            places = [tempfile.gettempdir()]
            if os.access(MEMORY_FOLDER, os.W_OK):
                places.insert(0, MEMORY_FOLDER)
            for place in places:
                _remove_leftovers(place)
            self._folders = [tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place) for place in places]
        return tuple(self._folders)

    def _remove(self, file: str, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        with contextlib.suppress(OSError):
            os.remove(file)


def _remove_leftovers(place: str) -> None:
    """The folders of servers that were killed; their names say whose they were."""
    for entry in os.scandir(place):
        owner = re.fullmatch(PREFIX + r"(\d+)-\w+", entry.name)
        if owner and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(entry.path, ignore_errors=True)
