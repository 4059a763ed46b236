"""Loading by request, and idle times: real workers behind the manager."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import psutil
import pytest

from lmserve.errors import (
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    NotReady,
    WorkerDied,
)
from lmserve.models.entry import LoadOptions, ModelEntry
from lmserve.models.life import Observer
from tests.models.managing import Recorder, ask, complete, lazy, my_workers, play, until


@pytest.mark.slow
def test_requests_share_one_load_and_the_idle_model_goes_and_comes_back(tiny_folder: Path, recorder: Recorder) -> None:
    manager = lazy(tiny_folder, recorder)
    others = psutil.Process().children()

    async def scenario() -> None:
        entry = manager.resolve("tiny")
        assert (entry.state, manager.problem()) == ("not-loaded", None)
        answers = await asyncio.gather(*(ask(manager, "tiny", f"r{i}", ttl=0.2) for i in range(4)))
        assert len({tuple(answer) for answer in answers}) == 1
        assert recorder.stages.count("making the KV cache") == 1, "one load for all"
        assert (entry.is_just_in_time, entry.ttl_seconds) == (True, 0.2)
        (worker,) = my_workers(others)
        await until(lambda: entry.state == "not-loaded")
        assert recorder.gone == ["tiny"]
        await until(lambda: not my_workers(others))
        assert not worker.is_running()
        assert await ask(manager, "tiny") == answers[0]
        assert entry.ttl_seconds == 3600

    play(manager, scenario)


def test_no_time_passes_while_a_request_runs(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        async with manager.use("tiny", 0.05) as entry:
            await asyncio.sleep(0.3)
            assert (entry.state, entry.ttl_left_seconds) == ("loaded", None)
            async with manager.use("tiny"):
                pass
            await asyncio.sleep(0.3)
            assert len(await complete(entry, "r")) == 4
        assert entry.ttl_left_seconds is not None
        await until(lambda: entry.state == "not-loaded")

    play(manager, scenario)


def test_a_model_that_nobody_waits_for_any_more_has_its_time_too(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        request = asyncio.create_task(ask(manager, "tiny", ttl=0.3))
        entry = manager.resolve("tiny")
        await until(lambda: entry.worker is not None)
        request.cancel()
        await until(lambda: entry.state == "loaded")
        await until(lambda: entry.state == "not-loaded")

    play(manager, scenario)


@pytest.mark.slow
def test_a_model_whose_worker_died_idle_comes_back_and_goes_in_time(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        await ask(manager, "tiny", ttl=1.0)
        entry = manager.resolve("tiny")
        assert entry.worker is not None
        entry.worker.process.kill()
        await until(lambda: entry.restarts == 1 and entry.state == "loaded")
        await until(lambda: entry.state == "not-loaded")

    play(manager, scenario)


def test_a_request_in_the_moment_of_the_end_is_not_the_ends_victim(tiny_folder: Path) -> None:
    """The timer fires, and in the same turn of the loop somebody asks: the model is loaded again for them."""
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        first = await ask(manager, "tiny", ttl=1000.0)
        entry = manager.resolve("tiny")
        entry.ttl_seconds = 0.0
        manager._expire(entry)
        assert await ask(manager, "tiny") == first

    play(manager, scenario)


def test_a_drain_refuses_no_request_that_it_had_accepted(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        request = asyncio.create_task(ask(manager, "tiny"))
        await until(lambda: manager.resolve("tiny").worker is not None)
        manager.drain()
        with pytest.raises(NotReady, match="shutting down"):
            await ask(manager, "tiny")
        assert len(await request) == 4
        await asyncio.wait_for(manager.wait_idle(), 10)

    play(manager, scenario)


def test_a_request_may_keep_a_model_for_ever(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, ttl_seconds=0.05)

    async def scenario() -> None:
        await ask(manager, "tiny", ttl=math.inf)
        entry = manager.resolve("tiny")
        assert (entry.ttl_seconds, entry.ttl_left_seconds) == (None, None)
        await asyncio.sleep(0.2)
        assert entry.info is not None
        await ask(manager, "tiny", ttl=0.0)
        await until(lambda: entry.state == "not-loaded")

    play(manager, scenario)


def test_a_load_that_fails_gives_each_who_waits_the_reason(tiny_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    manager = lazy(broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])

    async def scenario() -> None:
        waiting = [asyncio.create_task(ask(manager, "tiny", f"r{i}")) for i in range(3)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(error) for error in errors} == {ModelLoadFailed}
        assert len({str(error) for error in errors}) == 1
        entry = manager.resolve("tiny")
        assert (entry.state, entry.failure) == ("not-loaded", str(errors[0]))
        assert manager.problem() is None, "a model that nobody has loaded makes no server ill"
        (broken / "model.safetensors").write_bytes(weights)
        assert len(await ask(manager, "tiny")) == 4, "and the next request tries again"

    play(manager, scenario)


def test_a_worker_that_dies_while_it_loads_is_a_reason_too(tiny_folder: Path) -> None:
    class Killer(Observer):
        def staged(self, entry: ModelEntry) -> None:
            assert entry.worker is not None
            entry.worker.process.kill()

    manager = lazy(tiny_folder, Killer())

    async def scenario() -> None:
        with pytest.raises(WorkerDied, match="exit code -9"):
            await ask(manager, "tiny")

    play(manager, scenario)


def test_a_load_that_takes_too_long_goes_on_without_the_request(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, first_token_seconds=0.1)

    async def scenario() -> None:
        with pytest.raises(NotReady, match=r"loading for 0.1 seconds"):
            await ask(manager, "tiny")
        await until(lambda: manager.resolve("tiny").state == "loaded")
        assert len(await ask(manager, "tiny")) == 4

    play(manager, scenario)


def test_without_just_in_time_loading_a_known_model_is_named_with_the_remedy(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, just_in_time=False)

    async def scenario() -> None:
        with pytest.raises(ModelNotFound, match="lmserve load tiny"):
            await ask(manager, "tiny")
        await manager.load("tiny", LoadOptions())
        assert len(await ask(manager, "tiny")) == 4

    play(manager, scenario)


def test_an_embedding_model_is_not_asked_for_text(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder)

    async def scenario() -> None:
        with pytest.raises(InvalidRequest, match="embeddings"):
            await ask(manager, "all-minilm-l6-v2")

    play(manager, scenario)
