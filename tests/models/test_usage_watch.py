"""When devices are looked at, and what entries then know: real workers behind a manager."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmserve.models import usage_watch
from lmserve.models.entry import LoadOptions, ModelEntry
from lmserve.models.usage import DeviceUsage, UsageReader, Watched, WorkerUsage
from lmserve.models.usage_watch import UsageWatch
from lmserve.runtime.interface import MemoryPlan
from tests.models.managing import Recorder, lazy, manager_of, play, until
from tests.models.managing import config as tiny_config


class Counting(UsageReader):
    """Counts how often it is asked, and about whom."""

    def __init__(self) -> None:
        super().__init__(list)
        self.asked: list[list[Watched]] = []

    def read(self, workers: Sequence[Watched]) -> dict[int, WorkerUsage]:
        self.asked.append([*workers])
        return super().read(workers)


class Looking(Recorder):
    """Remembers who was looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[list[str]] = []

    def looked(self, entries: Sequence[ModelEntry]) -> None:
        self.looks.append([entry.model_id for entry in entries])


def test_a_look_is_good_for_a_while_and_a_worker_that_has_ended_is_forgotten(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)
    reader = Counting()
    watch = UsageWatch(manager.entries, reader)

    async def scenario() -> None:
        await watch.look()
        assert reader.asked == [[]]
        entry = await manager.load("tiny", LoadOptions())
        await watch.look(1000.0)
        await watch.look(1000.0)
        assert entry.worker is not None
        about = [Watched(entry.worker.process.pid, "cpu")]
        assert reader.asked == [[], about], "the first look did not know it, the second is new enough"
        await watch.look(0.0)
        assert reader.asked == [[], about, about]
        assert entry.usage is not None
        assert entry.own_bytes == pytest.approx(entry.resident_bytes, rel=0.2)
        had = entry.own_bytes
        assert await manager.unload("tiny") == pytest.approx(had, rel=0.2)
        assert entry.own_bytes == 0
        assert manager.resolve("tiny").usage is None

    play(manager, scenario)


def test_whoever_runs_is_looked_at_and_who_is_idle_is_not(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_watch, "LOOK_SECONDS", 0.02)
    observer = Looking()
    manager = manager_of(tiny_config(tiny_folder), observer=observer)

    async def scenario() -> None:
        manager.start()
        await manager.wait_loaded()
        assert observer.looks, "while it was loading"
        await asyncio.sleep(0.2)
        num_looks = len(observer.looks)
        await asyncio.sleep(0.2)
        assert len(observer.looks) == num_looks, "it is idle"
        async with manager.use("tiny"):
            await until(lambda: len(observer.looks) > num_looks + 2)
        assert observer.looks[-1] == ["tiny"]

    play(manager, scenario)


def test_what_a_gpu_has_given_already_is_not_kept_free_for_it_again(tiny_folder: Path) -> None:
    entry = lazy(tiny_folder).resolve("tiny")
    terms = {"weight_bytes": 60, "kv_cache_bytes": 30, "activation_bytes": 10, "fixed_bytes": 0}
    entry.plan = MemoryPlan(
        device="cuda", dtype="bfloat16", max_model_len=1, max_num_seqs=1, kv_cache_tokens=1, free_bytes=200, **terms
    )
    entry.state = "loading"
    assert entry.promised_bytes == 100
    device = DeviceUsage(name="cuda", total_bytes=200, used_bytes=40)
    entry.usage = WorkerUsage(device=device, own_bytes=40, cpu=0.0)
    assert (entry.promised_bytes, entry.own_bytes) == (60, 40)
