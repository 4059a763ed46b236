"""Loading by request, idle times, and models that make room for others: real workers behind the manager."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmserve.config import Config, ModelConfig, ModelSetup
from lmserve.errors import (
    InsufficientMemory,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnloaded,
    NotReady,
    WorkerDied,
)
from lmserve.models.entry import LoadOptions, ModelEntry
from lmserve.models.life import Observer
from lmserve.models.manager import ModelManager
from tests.models.managing import Recorder, complete, config, play


def setup_tiny(model_id: str, model: str, **keys: int) -> ModelSetup:
    made = config(model, model_id)
    return ModelSetup(ModelConfig(**{**made.to_options(), **keys}))  # type: ignore[arg-type]  # a table of mixed values


@pytest.fixture(autouse=True)
def _no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def lazy(folder: Path, observer: Observer | None = None, names: Sequence[str] = ("tiny",), **keys: Any) -> ModelManager:
    """Knows the tiny model by these names and has nothing loaded."""
    aliases = tuple((name, str(folder)) for name in names)
    keys.setdefault("setup", setup_tiny)
    return ModelManager(Config(aliases=aliases, **keys), observer)


async def ask(manager: ModelManager, name: str, request_id: str = "r", ttl: float | None = None) -> list[int]:
    async with manager.use(name, ttl) as entry:
        return await complete(entry, request_id)


def my_workers(others: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The child processes that were not there before; servers of other tests may be."""
    return [process for process in psutil.Process().children() if process not in others]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), 60)


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


class Crowded:
    """A machine on which two of three models fit, by the KV cache that they ask for."""

    def __init__(self) -> None:
        self.share = int(psutil.virtual_memory().available * 0.4)

    def __call__(self, model_id: str, model: str) -> ModelSetup:
        return setup_tiny(model_id, model, kv_cache_memory=self.share, max_num_seqs=4096, max_model_len=10**6)


def test_the_least_recently_used_idle_model_makes_room(tiny_folder: Path, recorder: Recorder) -> None:
    manager = lazy(tiny_folder, recorder, ("a", "b", "c"), setup=Crowded())

    async def scenario() -> None:
        for name in ("a", "b"):
            await ask(manager, name)
        await ask(manager, "a")
        estimate = await manager.estimate("c", LoadOptions())
        assert (estimate.leaving, estimate.fits) == (["b"], True)
        assert "once b is unloaded" in estimate.message
        await ask(manager, "c")
        assert recorder.gone == ["b"]
        assert {e.model_id for e in manager.entries() if e.is_live} == {"a", "c"}

    play(manager, scenario)


def test_nothing_makes_room_that_is_in_use_or_a_persons_and_the_refusal_has_the_numbers(tiny_folder: Path) -> None:
    manager = lazy(tiny_folder, None, ("a", "b", "c"), setup=Crowded())

    async def scenario() -> None:
        await manager.load("a", LoadOptions())
        async with manager.use("b"):
            with pytest.raises(InsufficientMemory) as refused:
                await ask(manager, "c")
            words = str(refused.value)
            for fact in ("Model c needs", "weights", "KV cache", "activations", "fixed", "are free"):
                assert fact in words
            assert "a (" in words
            assert "loaded by a person" in words
            assert "in use" in words
            assert manager.resolve("c").state == "not-loaded"
            estimate = await manager.estimate("c", LoadOptions())
            assert not estimate.fits
            assert (await manager.load("c", LoadOptions(force=True))).state == "loaded"

    play(manager, scenario)
