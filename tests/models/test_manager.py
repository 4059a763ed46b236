"""Real worker processes behind the manager."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from lmserve.errors import ModelLoadFailed, NotReady, WorkerDied
from lmserve.models import life
from lmserve.models.entry import ModelEntry
from lmserve.models.life import Observer
from lmserve.outputs import FinishReason
from tests.models.managing import Recorder, complete, config, manager_of, request


def test_a_model_loads_answers_dies_comes_back_and_ends(tiny_folder: Path) -> None:
    async def play() -> None:
        observer = Recorder()
        manager = manager_of(config(tiny_folder), observer=observer)
        entry = manager.resolve("tiny")
        manager.start()
        assert manager.problem() is not None
        with pytest.raises(NotReady, match="loading"):
            _ = entry.engine
        await manager.wait_loaded()
        assert manager.problem() is None
        assert "loading weights" in observer.stages
        assert any(0 < progress < 1 for progress in observer.progress)
        assert entry.info is not None
        assert entry.info.max_model_len == 3000
        first = await complete(entry, "a")
        assert len(first) == 4

        assert entry.worker is not None
        pid = entry.worker.process.pid
        running = asyncio.create_task(complete(entry, "b", 2900))
        await asyncio.sleep(0.2)
        entry.worker.process.kill()
        with pytest.raises(WorkerDied):
            await running
        await asyncio.sleep(0)
        with pytest.raises((NotReady, WorkerDied)):
            await complete(entry, "c")
        while entry.restarts == 0:
            await asyncio.sleep(0.02)
        assert "ended by itself" in (manager.problem() or "")
        await manager.wait_loaded()
        assert entry.restarts == 1
        assert entry.worker.process.pid != pid
        assert await complete(entry, "d") == first

        process = entry.worker.process
        await manager.stop()
        assert process.returncode is not None

    asyncio.run(play())


def test_closing_a_stream_frees_its_blocks(tiny_folder: Path) -> None:
    async def play() -> None:
        manager = manager_of(config(tiny_folder))
        manager.start()
        await manager.wait_loaded()
        entry = manager.resolve("tiny")
        engine = entry.engine
        free = engine.stats.num_free_blocks
        stream = engine.generate(request("a", 2900))
        await anext(stream)
        await stream.aclose()
        assert engine.num_live == 0
        await complete(entry, "b")
        assert engine.stats.num_cancelled == 1
        assert engine.stats.num_free_blocks == free
        manager.drain()
        with pytest.raises(NotReady, match="shutting down"):
            async with manager.use("tiny"):
                pass
        assert manager.resolve("tiny") is entry, "a request that came before the drain finds what it uses"
        await manager.wait_idle()
        await manager.stop()

    asyncio.run(play())


def test_what_cannot_be_loaded_is_failed_with_the_reason(tmp_path: Path) -> None:
    async def play() -> None:
        manager = manager_of(config(tmp_path / "nothing"))
        manager.start()
        with pytest.raises(ModelLoadFailed, match="nothing"):
            await manager.wait_loaded()
        entry = manager.resolve("tiny")
        assert entry.state == "failed"
        with pytest.raises(NotReady, match="failed"):
            _ = entry.engine
        await manager.stop()

    asyncio.run(play())


def test_stopping_while_a_model_loads_leaves_nothing(tiny_folder: Path) -> None:
    async def play() -> None:
        manager = manager_of(config(tiny_folder))
        manager.start()
        await asyncio.sleep(0.5)
        await asyncio.wait_for(manager.stop(), 10)

    asyncio.run(play())


def test_the_loaded_model_stops_at_the_limit(tiny_folder: Path) -> None:
    async def play() -> None:
        manager = manager_of(replace(config(tiny_folder), max_model_len=64))
        manager.start()
        await manager.wait_loaded()
        entry = manager.resolve("tiny")
        outputs = [output async for output in entry.engine.generate(request("a", 1000))]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(output.token_ids) for output in outputs) == 64 - 3
        await manager.stop()

    asyncio.run(play())


@pytest.mark.slow
def test_a_worker_that_keeps_dying_while_it_loads_is_given_up(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "FIRST_BACKOFF_SECONDS", 0.01)

    async def play() -> None:
        class Killer(Observer):
            def staged(self, entry: ModelEntry) -> None:
                assert entry.worker is not None
                entry.worker.process.kill()

        manager = manager_of(config(tiny_folder), observer=Killer())
        manager.start()
        with pytest.raises(ModelLoadFailed, match=r"ended while loading \(exit code -9\)"):
            await asyncio.wait_for(manager.wait_loaded(), 120)
        await manager.stop()

    asyncio.run(play())
