"""Real worker processes behind the manager."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lmserve.config import ModelConfig
from lmserve.engine.messages import AddRequest
from lmserve.errors import ModelLoadFailed, ModelNotFound, NotReady, WorkerDied
from lmserve.models import manager as manager_module
from lmserve.models.manager import ModelEntry, ModelManager
from lmserve.outputs import FinishReason
from lmserve.sampling_params import SamplingParams


def config(folder: Path | str, model_id: str = "tiny") -> ModelConfig:
    return ModelConfig(
        model=str(folder), model_id=model_id, device="cpu", threads=1, max_model_len=3000, max_num_seqs=4
    )


def request(request_id: str, max_tokens: int = 4) -> AddRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return AddRequest(request_id, [5, 6, 7], sampling)


async def complete(entry: ModelEntry, request_id: str, max_tokens: int = 4) -> list[int]:
    tokens: list[int] = []
    async for output in entry.engine.generate(request(request_id, max_tokens)):
        tokens += output.token_ids
    return tokens


def test_a_model_loads_answers_dies_comes_back_and_ends(tiny_folder: Path) -> None:
    async def play() -> None:
        stages: list[str] = []
        manager = ModelManager([config(tiny_folder)], on_stage=lambda model_id, stage: stages.append(stage))
        (entry,) = manager.entries()
        manager.start()
        assert manager.problem() is not None
        with pytest.raises(NotReady, match="loading"):
            _ = entry.engine
        await manager.wait_loaded()
        assert manager.problem() is None
        assert "loading weights" in stages
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
        manager = ModelManager([config(tiny_folder)])
        manager.start()
        await manager.wait_loaded()
        (entry,) = manager.entries()
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
            manager.resolve("tiny")
        await manager.wait_idle()
        await manager.stop()

    asyncio.run(play())


def test_what_cannot_be_loaded_is_failed_with_the_reason(tmp_path: Path) -> None:
    async def play() -> None:
        manager = ModelManager([config(tmp_path / "nothing")])
        manager.start()
        with pytest.raises(ModelLoadFailed, match="nothing"):
            await manager.wait_loaded()
        (entry,) = manager.entries()
        assert entry.state == "failed"
        with pytest.raises(NotReady, match="failed"):
            _ = entry.engine
        await manager.stop()

    asyncio.run(play())


def test_stopping_while_a_model_loads_leaves_nothing(tiny_folder: Path) -> None:
    async def play() -> None:
        manager = ModelManager([config(tiny_folder)])
        manager.start()
        await asyncio.sleep(0.5)
        await asyncio.wait_for(manager.stop(), 10)

    asyncio.run(play())


def test_names(tiny_folder: Path) -> None:
    one = ModelManager([config(tiny_folder, "org/one")])
    assert one.resolve("org/one").model_id == "org/one"
    assert one.resolve("one").model_id == "org/one"
    assert one.resolve("gpt-4o").model_id == "org/one", "with one model any name is served by it"
    assert one.resolve(None).model_id == "org/one"
    hub = ModelManager([config("Qwen/Qwen3-0.6B", "qwen3-0.6b"), config(tiny_folder, "other")], strict_names=True)
    assert hub.resolve("Qwen/Qwen3-0.6B").model_id == "qwen3-0.6b"
    strict = ModelManager([config(tiny_folder, "org/one")], strict_names=True)
    with pytest.raises(ModelNotFound, match=r"'gpt-4o' is not loaded. Your models: org/one"):
        strict.resolve("gpt-4o")
    two = ModelManager([config(tiny_folder, "a/x"), config(tiny_folder, "b/x"), config(tiny_folder, "b/y")])
    assert two.resolve("y").model_id == "b/y"
    for ambiguous in ("x", "z", None):
        with pytest.raises(ModelNotFound):
            two.resolve(ambiguous)


def test_the_loaded_model_stops_at_the_limit(tiny_folder: Path) -> None:
    async def play() -> None:
        manager = ModelManager([replace(config(tiny_folder), max_model_len=64)])
        manager.start()
        await manager.wait_loaded()
        (entry,) = manager.entries()
        outputs = [output async for output in entry.engine.generate(request("a", 1000))]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(output.token_ids) for output in outputs) == 64 - 3
        await manager.stop()

    asyncio.run(play())


def test_a_worker_that_keeps_dying_while_it_loads_is_given_up(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "FIRST_BACKOFF_SECONDS", 0.01)

    async def play() -> None:
        def kill_workers(model_id: str, stage: str) -> None:
            for process in psutil.Process().children():
                process.kill()

        manager = ModelManager([config(tiny_folder)], on_stage=kill_workers)
        manager.start()
        with pytest.raises(ModelLoadFailed, match=r"ended while loading \(exit code -9\)"):
            await asyncio.wait_for(manager.wait_loaded(), 120)
        await manager.stop()

    asyncio.run(play())
