"""What the tests of downloads share: a large model, a loop to run in, and a look at the processes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping

import psutil
import uvloop

from lmserve.models.downloads import Downloads, Job

PATIENCE = 60.0
"""Seconds that anything may take before a test is wrong."""
REPO = "someone/tiny"
MIB = 1 << 20
HELD = 13 * MIB
"""huggingface_hub writes pieces of 10 MiB: of a file that is held here, one is on the disk."""

Test = Callable[[Downloads], Awaitable[None]]


def run(test: Test, environ: Mapping[str, str], on_completed: Callable[[Job], None] | None = None) -> None:
    """On the loop that the server has. No process is left behind."""

    async def go() -> None:
        downloads = Downloads(on_completed, environ)
        try:
            await asyncio.wait_for(test(downloads), PATIENCE)
        finally:
            await downloads.close()
            assert not processes_of_downloads()

    uvloop.run(go())


def processes_of_downloads(of: psutil.Process | None = None) -> list[psutil.Process]:
    """Those alive among the children."""
    found = []
    for child in (of or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
            if "lmserve.models.hub_download" in child.cmdline():
                found.append(child)
    return found


def large_model() -> dict[str, bytes]:
    """Two shards, of which one is small enough to come whole while the other is held."""
    noise = random.Random(0).randbytes
    return {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": noise(2 * MIB),
        "model-00002-of-00002.safetensors": noise(24 * MIB),
    }


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def download(downloads: Downloads, model: str = REPO, quantization: str | None = None) -> Job:
    return await downloads.wait(downloads.start(model, quantization=quantization).job_id)
