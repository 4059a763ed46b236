"""One model's life, from the wish to have it loaded to its end: loaded, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lmserve.config import ModelConfig
from lmserve.errors import ConfigError, InsufficientMemory, LMServeError, ModelLoadFailed, WorkerDied
from lmserve.models.admission import Admission
from lmserve.models.entry import ModelEntry, Origin, State
from lmserve.models.starter import ensure_starter, is_starter, made_folder
from lmserve.models.worker_process import Worker

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
MAX_LOADING_DEATHS = 3
"""Workers in a row that may die while loading (killed for memory, say) before the model is given up."""
STABLE_SECONDS = 60.0
"""A worker that lived this long is forgiven its predecessors' deaths."""


class Observer:
    """Hears what becomes of models. The methods do nothing: whoever wants to hear overrides them."""

    def placed(self, entry: ModelEntry) -> None:
        """A loading model's files are where its path says: others can read them too."""

    def staged(self, entry: ModelEntry) -> None:
        """A loading model does something else, or is further with it."""

    def said(self, entry: ModelEntry, pid: int, line: str) -> None:
        """Its worker wrote a line to its standard error."""

    def unloaded(self, entry: ModelEntry) -> None:
        """It is gone, or failed: what is kept for it can go too."""

    def looked(self, entries: Sequence[ModelEntry]) -> None:
        """How full and busy their devices are was looked at, while one of them runs or has just done so."""


async def placed(config: ModelConfig, starter_cache: Path) -> ModelConfig:
    """The configuration with a starter's folder instead of its name.

    Raises:
        ModelLoadFailed: it cannot be made.
    """
    if not is_starter(config.model):
        return config
    try:
        folder = await asyncio.to_thread(ensure_starter, config.model.lower(), starter_cache)
    except ConfigError as error:
        raise ModelLoadFailed(str(error)) from error
    return replace(config, model=str(folder))


class Life:
    """Owns an entry while it is live, and its worker processes. ``end`` it, or it ends by itself when it cannot load.

    ``ready`` is done once it is known whether the model can be loaded: None, or why not.
    """

    def __init__(
        self,
        entry: ModelEntry,
        admission: Admission,
        observer: Observer,
        *,
        starter_cache: Path,
        force: bool,
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        self.entry = entry
        self.ready: asyncio.Future[LMServeError | None] = asyncio.get_running_loop().create_future()
        self._admission = admission
        self._observer = observer
        self._starter_cache = starter_cache
        self._force = force
        self._changed = changed
        self._reason: LMServeError | None = None
        self._is_ending = False
        self._was_loaded = False
        entry.state, entry.stage, entry.progress, entry.failure, entry.restarts = "loading", "starting", 0.0, None, 0
        self._task = asyncio.create_task(self._live(), name=f"life of {entry.model_id}")

    @property
    def is_ending(self) -> bool:
        """Whether it takes no more requests."""
        return self._is_ending or self._task.done()

    async def end(self, reason: LMServeError) -> int:
        """Returns the bytes of its device that its process had, when the process is gone. ``reason``: what its requests
        are told."""
        had = self.entry.own_bytes
        self.begin_end(reason)
        await self.ended()
        return had

    def begin_end(self, reason: LMServeError) -> None:
        """From now on it takes no more requests. The first reason counts."""
        if not self.is_ending:
            self._is_ending, self._reason = True, reason
            self._task.cancel()

    async def ended(self) -> None:
        """Returns when nothing is left of it."""
        await asyncio.wait({self._task})

    async def _live(self) -> None:
        state: State = "not-loaded"
        try:
            await self._supervise()
        except (ModelLoadFailed, InsufficientMemory, WorkerDied) as error:
            logger.error("Model %s: %s", self.entry.model_id, error)
            self._reason = error
            self.entry.failure = str(error)
            state = "failed" if self.entry.origin is Origin.START else "not-loaded"
        except Exception as error:
            logger.exception("Model %s: its life ended unforeseen", self.entry.model_id)
            self._reason = ModelLoadFailed(f"Model {self.entry.model_id} cannot be kept loaded: {error}")
            self.entry.failure = str(self._reason)
        finally:
            self.entry.plan = None
            await self._set_state(state)
            self._settle(self._reason)
            self._observer.unloaded(self.entry)

    async def _supervise(self) -> None:
        """Loads, and loads again when the worker dies.

        Raises:
            ModelLoadFailed, InsufficientMemory: nothing will change that by itself.
            WorkerDied: too often.
        """
        entry, backoff, loading_deaths = self.entry, FIRST_BACKOFF_SECONDS, 0
        while True:
            began = time.monotonic()
            try:
                await self._load_and_run()
            except WorkerDied as error:
                if not self._was_loaded:
                    self._mark_dead()
                loading_deaths = 0 if self._was_loaded else loading_deaths + 1
                is_first = not self.ready.done() and entry.origin is not Origin.START
                if loading_deaths == MAX_LOADING_DEATHS or (loading_deaths and is_first):
                    raise
                entry.failure = str(error)
            if time.monotonic() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            logger.error("%s It is started again in %.1f s.", entry.failure, backoff)
            await self._changed()
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)

    async def _load_and_run(self) -> None:
        """One worker's life. Always ends in an exception; the process is gone by then."""
        entry = self.entry
        self._was_loaded = False
        await self._place()
        self._observer.placed(entry)
        async with self._admission.starting:
            worker = entry.worker = await Worker.start(
                lambda pid, line: self._observer.said(entry, pid, line), beside_images="vision" in entry.capabilities
            )
            try:
                reserved = await self._admission.admit(entry, worker, force=self._force)
            except BaseException:
                await self._end_worker(worker)
                raise
        try:
            await worker.load(entry.worker_config, reserved, self._say_stage)
            entry.failure, entry.idle_since = None, time.monotonic()
            self._was_loaded = True
            await self._set_state("loaded")
            self._settle(None)
            await worker.engine.run()
            # In the same turn as its requests are told: whoever asks next sees that it is not loaded.
            self._mark_dead()
        finally:
            await self._end_worker(worker)
        code = worker.process.returncode
        raise WorkerDied(f"The worker of model {entry.model_id} ended by itself (exit code {code}).")

    def _mark_dead(self) -> None:
        """Its worker has ended by itself; another one will be started."""
        entry = self.entry
        entry.state, entry.restarts = "loading", entry.restarts + 1
        entry.stage, entry.progress, entry.plan = "starting", 0.0, None
        entry.failure = f"The worker of model {entry.model_id} ended by itself."

    async def _end_worker(self, worker: Worker) -> None:
        try:
            with contextlib.suppress(Exception):
                await worker.stop(self._reason)
        finally:
            self.entry.worker = self.entry.usage = None

    async def _place(self) -> None:
        """A starter model is made where it is not there yet."""
        model = self.entry.config.model
        if is_starter(model) and made_folder(model.lower(), self._starter_cache) is None:
            self._say_stage("making the starter model", 0.0)
        self.entry.config = await placed(self.entry.config, self._starter_cache)

    def _say_stage(self, stage: str, progress: float) -> None:
        self.entry.stage, self.entry.progress = stage, progress
        self._observer.staged(self.entry)

    def _settle(self, error: LMServeError | None) -> None:
        if not self.ready.done():
            self.ready.set_result(error)

    async def _set_state(self, state: State) -> None:
        self.entry.state = state
        await self._changed()
