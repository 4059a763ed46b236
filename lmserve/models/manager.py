"""Which models there are, in which state, and who keeps their workers alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmserve.config import ModelConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.errors import ModelLoadFailed, ModelNotFound, NotReady, WorkerDied
from lmserve.models.worker_process import WorkerProcess, start_worker
from lmserve.runtime.interface import RunnerInfo

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
MAX_LOADING_DEATHS = 3
"""Workers in a row that may die while loading (killed for memory, say) before the model is given up."""
STABLE_SECONDS = 60.0
"""A worker that lived this long is forgiven its predecessors' deaths."""

State = Literal["loading", "loaded", "failed"]


@dataclass(slots=True)
class ModelEntry:
    """One model as the server knows it."""

    config: ModelConfig
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "loading"
    stage: str = "starting"
    """What a loading model is doing, for people."""
    failure: str | None = None
    """Why it is failed, or why the last worker ended."""
    restarts: int = 0
    worker: WorkerProcess | None = None

    @property
    def model_id(self) -> str:
        return self.config.model_id

    @property
    def path(self) -> str:
        """Local folder, GGUF file or hub name."""
        return self.config.model

    @property
    def info(self) -> RunnerInfo | None:
        return None if self.worker is None else self.worker.engine.info

    @property
    def engine(self) -> AsyncEngine:
        """Raises NotReady unless the model is loaded."""
        if self.worker is None or self.state != "loaded":
            reason = f": {self.failure}" if self.failure else f" ({self.stage})"
            raise NotReady(f"Model {self.model_id} is {self.state}{reason}", retry_after=2.0)
        return self.worker.engine


class ModelManager:
    """Owns one entry and one supervising task for each configured model.

    A supervisor loads the model, waits for its worker's end, and starts it again with a growing pause. A model that
    cannot be loaded is failed for good: the reason would not change by itself.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        *,
        strict_names: bool = False,
        on_stage: Callable[[str, str], None] | None = None,
    ) -> None:
        self._entries = {config.model_id: ModelEntry(config) for config in configs}
        self._strict_names = strict_names
        self._on_stage = on_stage
        self._supervisors: list[asyncio.Task[None]] = []
        self._draining = False
        self._changed = asyncio.Condition()

    def entries(self) -> list[ModelEntry]:
        return list(self._entries.values())

    def resolve(self, name: str | None) -> ModelEntry:
        """The entry a client means.

        Its id; or what stands behind the id's slash, or where the model comes from (a hub name, say), if that is one
        model's alone; or any name if there is only one model and names are not strict.

        Raises:
            ModelNotFound: with the names there are.
            NotReady: the server is draining.
        """
        if self._draining:
            raise NotReady("The server is shutting down.", retry_after=5.0)
        if name is not None:
            exact = self._entries.get(name)
            if exact is not None:
                return exact
            alike = [entry for entry in self._entries.values() if _is_other_name(entry, name)]
            if len(alike) == 1:
                return alike[0]
        if len(self._entries) == 1 and (name is None or not self._strict_names):
            return next(iter(self._entries.values()))
        known = ", ".join(self._entries)
        asked = "No model was named" if name is None else f"Model {name!r} is not loaded"
        raise ModelNotFound(f"{asked}. Your models: {known}.", "model")

    def problem(self) -> str | None:
        """Why the server is not healthy, or None."""
        if self._draining:
            return "draining"
        for entry in self._entries.values():
            if entry.state != "loaded":
                detail = entry.failure if entry.state == "failed" else entry.failure or entry.stage
                return f"model {entry.model_id} is {entry.state}: {detail}"
        return None

    def start(self) -> None:
        """Begins to load every model; returns at once."""
        self._supervisors = [
            asyncio.create_task(self._supervise(entry), name=f"supervise {entry.model_id}")
            for entry in self._entries.values()
        ]

    async def wait_loaded(self) -> None:
        """Returns when every model is loaded.

        Raises:
            ModelLoadFailed: one of them cannot be.
        """
        async with self._changed:
            while True:
                for entry in self._entries.values():
                    if entry.state == "failed":
                        raise ModelLoadFailed(entry.failure or "unknown reason")
                if all(entry.state == "loaded" for entry in self._entries.values()):
                    return
                await self._changed.wait()

    def drain(self) -> None:
        """From now on new requests are refused."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns when no request is alive on any worker."""
        await asyncio.gather(*(e.worker.engine.wait_idle() for e in self._entries.values() if e.worker is not None))

    async def stop(self) -> None:
        """Ends every worker. Nothing is left behind, also when a model is still loading."""
        self._draining = True
        for task in self._supervisors:
            task.cancel()
        await asyncio.gather(*self._supervisors, return_exceptions=True)
        self._supervisors = []

    async def _supervise(self, entry: ModelEntry) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        loading_deaths = 0
        while True:
            began = time.monotonic()
            try:
                await self._load_and_run(entry)
            except ModelLoadFailed as error:
                await self._set_state(entry, "failed", str(error))
                return
            except WorkerDied as error:
                reason = str(error)
            loading_deaths = 0 if entry.state == "loaded" else loading_deaths + 1
            if loading_deaths == MAX_LOADING_DEATHS:
                await self._set_state(entry, "failed", reason)
                return
            if time.monotonic() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            logger.error("%s It is started again in %.1f s.", reason, backoff)
            entry.restarts += 1
            await self._set_state(entry, "loading", reason)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)

    async def _load_and_run(self, entry: ModelEntry) -> None:
        """One worker's life. Always ends in an exception; the process is gone by then."""
        worker = await start_worker(entry.config, lambda stage, fraction: self._say_stage(entry, stage))
        entry.worker = worker
        try:
            await self._set_state(entry, "loaded", None)
            await worker.engine.run()
        finally:
            entry.worker = None
            with contextlib.suppress(Exception):
                await worker.stop()
        code = worker.process.returncode
        raise WorkerDied(f"The worker of model {entry.model_id} ended by itself (exit code {code}).")

    def _say_stage(self, entry: ModelEntry, stage: str) -> None:
        entry.stage = stage
        if self._on_stage is not None:
            self._on_stage(entry.model_id, stage)

    async def _set_state(self, entry: ModelEntry, state: State, failure: str | None) -> None:
        entry.state, entry.failure = state, failure
        async with self._changed:
            self._changed.notify_all()


def _is_other_name(entry: ModelEntry, name: str) -> bool:
    return name in (entry.model_id.rpartition("/")[2], entry.path)
