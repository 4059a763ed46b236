"""Side processes and the files of features, with real processes."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmserve.errors import QueueFull
from lmserve.images import pool as module
from lmserve.images.job import BadImage, ImageJob, ProcessorError
from lmserve.images.pool import PREFIX, ImagePool
from tests.images.odd_files import encoded
from tests.images.tiny_vlms import pictures, write_tiny_vlm
from tests.processes import still_running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("vlm"), "gemma3")


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(module, "MEMORY_FOLDER", str(tmp_path / "memory"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "disk"))


def job(folder: Path, data: bytes | None = None) -> ImageJob:
    picture = encoded(pictures()["red"].convert("RGB"), "PNG") if data is None else data
    return ImageJob(picture, "auto", 10**6, str(folder), False, "")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_the_life_of_images_and_of_side_processes(folder: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "memory" / f"{PREFIX}{2**22 + 1}-abc"  # no process has this number
    other = tmp_path / "memory" / f"{PREFIX}{os.getpid()}-other"
    leftover.mkdir()
    other.mkdir()

    async def scenario() -> None:
        pool = ImagePool(processes=1)
        await pool.prepare(str(folder), trust_remote_code=False, revision="")
        image = await pool.process(job(folder))
        assert (image.facts.format, image.facts.width, image.facts.height) == ("PNG", 32, 32)
        assert Path(image.file).is_relative_to(tmp_path / "memory")
        assert pool.num_bytes == Path(image.file).stat().st_size == image.facts.num_bytes
        file = Path(image.file)
        del image
        gc.collect()
        assert not file.exists()
        assert pool.num_bytes == 0

        with pytest.raises(BadImage, match="no PNG"):
            await pool.process(job(folder, b"junk"))
        with pytest.raises(ProcessorError, match="cannot be loaded"):
            await pool.process(job(tmp_path))

        [process] = side_processes()
        assert process.nice() == 10
        process.kill()
        again = await pool.process(job(folder))
        assert Path(again.file).exists()
        [process] = side_processes()
        pool.close()
        assert not Path(again.file).exists()
        assert not still_running([process])

    run(scenario())
    assert not leftover.exists()
    assert other.exists()


def side_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any("spawn_main" in part for part in child.cmdline())]


def test_a_file_that_kills_its_reader_is_refused_after_a_second_try(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else's image can be told from it, so each has two tries."""
    monkeypatch.setattr("lmserve.images.side_process.process", die)

    async def scenario() -> None:
        pool = ImagePool(processes=1)
        with pytest.raises(BadImage, match="the process that looked at it died"):
            await pool.process(job(folder))
        pool.close()

    run(scenario())


def die(_: ImageJob) -> None:
    os._exit(1)


def test_images_take_so_much_room_and_no_more(folder: Path) -> None:
    async def scenario() -> None:
        pool = ImagePool(processes=1, max_bytes=1)
        first = await pool.process(job(folder))
        with pytest.raises(QueueFull, match="the limit is 1"):
            await pool.process(job(folder))
        del first
        gc.collect()
        await pool.process(job(folder))
        pool.close()

    run(scenario())
