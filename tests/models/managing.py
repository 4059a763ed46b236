"""A manager with real worker processes, and what tests ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil

from lmserve.config import Config, ModelConfig, ModelSetup
from lmserve.engine.messages import AddRequest
from lmserve.models.entry import ModelEntry
from lmserve.models.life import Observer
from lmserve.models.manager import ModelManager
from lmserve.sampling_params import SamplingParams


def config(folder: Path | str, model_id: str = "tiny") -> ModelConfig:
    return ModelConfig(
        model=str(folder), model_id=model_id, device="cpu", threads=1, max_model_len=3000, max_num_seqs=4
    )


def request(request_id: str, max_tokens: int = 4) -> AddRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return AddRequest(request_id, [5, 6, 7], sampling)


def manager_of(*configs: ModelConfig, observer: Observer | None = None, **keys: Any) -> ModelManager:
    return ModelManager(Config(models=configs, **keys), observer)


class Recorder(Observer):
    """Remembers what became of models."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.progress: list[float] = []
        self.lines: list[str] = []
        self.gone: list[str] = []

    def staged(self, entry: ModelEntry) -> None:
        self.stages.append(entry.stage)
        self.progress.append(entry.progress)

    def said(self, entry: ModelEntry, pid: int, line: str) -> None:
        self.lines.append(line)

    def unloaded(self, entry: ModelEntry) -> None:
        self.gone.append(entry.model_id)


async def complete(entry: ModelEntry, request_id: str, max_tokens: int = 4) -> list[int]:
    tokens: list[int] = []
    async for output in entry.engine.generate(request(request_id, max_tokens)):
        tokens += output.token_ids
    return tokens


def play(manager: ModelManager, scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs the scenario on an event loop, and ends every worker."""

    async def main() -> None:
        try:
            await scenario()
        finally:
            await manager.stop()

    asyncio.run(main())


def setup_tiny(model_id: str, model: str, **keys: int) -> ModelSetup:
    made = config(model, model_id)
    return ModelSetup(ModelConfig(**{**made.to_options(), **keys}))  # type: ignore[arg-type]  # a table of mixed values


def lazy(folder: Path, observer: Observer | None = None, names: Sequence[str] = ("tiny",), **keys: Any) -> ModelManager:
    """Knows the tiny model by these names and has nothing loaded."""
    aliases = tuple((name, str(folder)) for name in names)
    keys.setdefault("setup", setup_tiny)
    return ModelManager(Config(aliases=aliases, **keys), observer)


async def ask(manager: ModelManager, name: str, request_id: str = "r", ttl: float | None = None) -> list[int]:
    async with manager.use(name, ttl, task="generate") as entry:
        return await complete(entry, request_id)


def my_workers(others: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The child processes that were not there before; servers of other tests may be."""
    return [process for process in psutil.Process().children() if process not in others]


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), 60)
