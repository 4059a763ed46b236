"""A manager with real worker processes, and what tests ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from lmserve.config import Config, ModelConfig
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
