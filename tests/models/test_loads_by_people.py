"""Models that people load, name and unload: real workers behind the manager."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lmserve.config import Config, ModelSetup
from lmserve.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelUnloaded,
)
from lmserve.models.entry import LoadOptions
from lmserve.models.manager import ModelManager
from tests.models.managing import Recorder, ask, complete, config, lazy, my_workers, play, setup_tiny, until


@pytest.mark.slow
def test_a_further_instance_that_is_loaded_while_it_is_unloaded_stays_known(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        options = LoadOptions(identifier="again")
        life = manager._lives[await manager.load("tiny", options)]
        unloading = asyncio.create_task(manager.unload("again"))
        while not life.is_ending:
            await asyncio.sleep(0)
        entry = await manager.load("tiny", options)
        await unloading
        assert manager.resolve("again") is entry
        assert len(await ask(manager, "again")) == 4

    play(manager, scenario)


def test_who_only_waits_for_a_load_does_not_end_it(tiny_folder: Path) -> None:
    manager = ModelManager(Config(models=(config(tiny_folder),)))

    async def scenario() -> None:
        manager.start()
        loading = asyncio.create_task(manager.load("tiny", LoadOptions()))
        await until(lambda: manager.resolve("tiny").worker is not None)
        loading.cancel()
        await manager.wait_loaded()
        assert manager.resolve("tiny").state == "loaded"

    play(manager, scenario)


def test_the_code_of_what_merely_lies_there_is_not_trusted(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "found").symlink_to(tiny_folder)

    def trusting(model_id: str, model: str) -> ModelSetup:
        return ModelSetup(replace(config(model, model_id), trust_remote_code=True))

    aliases = (("named", str(tiny_folder)),)
    manager = ModelManager(Config(models_dir=str(tmp_path / "models"), aliases=aliases, setup=trusting))
    assert manager.resolve("named").config.trust_remote_code
    assert not manager.resolve("found").config.trust_remote_code


@pytest.mark.slow
def test_what_a_person_loaded_stays_and_is_unloaded_by_a_person(tiny_folder: Path, recorder: Recorder) -> None:
    manager = lazy(tiny_folder, recorder, ttl_seconds=0.05)

    async def scenario() -> None:
        entry = await manager.load("tiny", LoadOptions(context_length=100, parallel=2))
        assert entry.info is not None
        assert (entry.info.max_model_len, entry.info.max_num_seqs) == (100, 2)
        await ask(manager, "tiny", ttl=0.05)
        await asyncio.sleep(0.2)
        assert entry.state == "loaded", "a request's ttl is no command to unload what a person wants"
        assert await manager.load("tiny", LoadOptions(ttl_seconds=1000.0)) is entry
        assert entry.ttl_left_seconds is not None
        with pytest.raises(InvalidRequest, match="other settings"):
            await manager.load("tiny", LoadOptions(context_length=50))
        second = await manager.load("tiny", LoadOptions(identifier="again", context_length=50))
        assert second is not entry
        assert {e.model_id for e in manager.entries() if e.is_live} == {"tiny", "again"}
        resident = second.resident_bytes
        assert resident > 50 * 2**20
        assert await manager.unload("AGAIN") == pytest.approx(resident, rel=0.2)
        assert "again" not in {e.model_id for e in manager.entries()}
        with pytest.raises(ModelNotFound, match="not loaded. Loaded: tiny"):
            await manager.unload("again")
        with pytest.raises(InvalidRequest, match="identifier"):
            await manager.load("tiny", LoadOptions(identifier="a b"))
        with pytest.raises(InvalidRequest, match="another model"):
            await manager.load("tiny", LoadOptions(identifier="all-minilm-l6-v2"))
        await manager.unload("tiny")
        await ask(manager, "tiny")
        assert entry.info is not None
        assert entry.info.max_model_len == 3000, "the next load is as configured"

    play(manager, scenario)


def test_unloading_tells_the_requests_that_run(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        running = asyncio.Event()

        async def long() -> None:
            async with manager.use("tiny") as entry:
                running.set()
                await complete(entry, "long", 2900)

        task = asyncio.create_task(long())
        await running.wait()
        assert await manager.unload("tiny") > 0
        with pytest.raises(ModelUnloaded, match="tiny was unloaded"):
            await task

    play(manager, scenario)


def test_unloading_a_model_that_loads_tells_those_who_wait(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)
    others = psutil.Process().children()

    async def scenario() -> None:
        waiting = [asyncio.create_task(ask(manager, "tiny", f"r{i}")) for i in range(2)]
        await until(lambda: manager.resolve("tiny").worker is not None)
        await manager.unload("tiny")
        for error in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(error, ModelUnloaded)
        assert not my_workers(others)

    play(manager, scenario)


def test_a_cancelled_load_leaves_nothing_unless_others_wait(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)
    others = psutil.Process().children()

    async def scenario() -> None:
        loading = asyncio.create_task(manager.load("tiny", LoadOptions()))
        await until(lambda: manager.resolve("tiny").worker is not None)
        loading.cancel()
        await asyncio.wait({loading})
        await until(lambda: manager.resolve("tiny").state == "not-loaded")
        await until(lambda: not my_workers(others))

        loading = asyncio.create_task(manager.load("tiny", LoadOptions()))
        await until(lambda: manager.resolve("tiny").worker is not None)
        request = asyncio.create_task(ask(manager, "tiny"))
        await asyncio.sleep(0)
        loading.cancel()
        assert len(await request) == 4

    play(manager, scenario)


def test_a_new_folder_is_found_when_it_is_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    manager = ModelManager(Config(models_dir=str(folder), setup=setup_tiny))

    async def scenario() -> None:
        with pytest.raises(ModelNotFound):
            await ask(manager, "new/one")
        (folder / "new").mkdir()
        (folder / "new" / "One").symlink_to(tiny_folder)
        await manager.refresh(0.0)
        assert len(await ask(manager, "new/one")) == 4
        (folder / "new" / "One").unlink()
        await manager.refresh(0.0)
        assert manager.resolve("one").state == "loaded", "what is loaded stays known"
        await manager.unload("new/one")
        with pytest.raises(ModelNotFound):
            manager.resolve("one")

    play(manager, scenario)
