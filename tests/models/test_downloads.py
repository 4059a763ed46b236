"""Real processes, the real huggingface_hub, and a stand-in for the hub."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from lmserve.models.downloads import Downloads
from tests.hub_stand_in import HubStandIn, hub_stand_in

PATIENCE = 60.0
"""Seconds that anything may take before a test is wrong."""
REPO = "someone/tiny"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        yield hub


def environment(hub: HubStandIn, tmp_path: Path, **more: str) -> dict[str, str]:
    """That of a server whose cache is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), **more}


def run(test: Callable[[Downloads], Awaitable[None]], environ: dict[str, str]) -> None:
    async def go() -> None:
        downloads = Downloads(environ=environ)
        try:
            await asyncio.wait_for(test(downloads), PATIENCE)
        finally:
            await downloads.close()

    asyncio.run(go())


def test_smoke(hub: HubStandIn, tmp_path: Path, tiny_folder: Path) -> None:
    total = hub.add_folder(REPO, tiny_folder)

    async def test(downloads: Downloads) -> None:
        job = await downloads.wait(downloads.start(REPO).job_id)
        print(job, hub.requests, total, hub.bytes_served)
        assert job.status == "completed", job.error
        assert job.downloaded_bytes == job.total_bytes == total
        job = await downloads.wait(downloads.start(REPO).job_id)
        assert job.status == "already_downloaded", job.error
        assert hub.bytes_served == total

    run(test, environment(hub, tmp_path))
