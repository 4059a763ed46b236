"""Which models there are, in which state; who is loaded when, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmserve.config import Config, cache_folder
from lmserve.errors import InvalidRequest, ModelLoadFailed, ModelNotFound, ModelUnloaded, NotReady
from lmserve.models.admission import Admission, size
from lmserve.models.entries import REFRESH_SECONDS, Entries
from lmserve.models.entry import RETRY_SECONDS, LoadOptions, ModelEntry, Origin
from lmserve.models.life import Life, Observer, placed
from lmserve.models.usage_watch import UsageWatch
from lmserve.models.worker_process import Worker
from lmserve.runtime.interface import MemoryPlan, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model would take, and what would have to go for it."""

    model_id: str
    plan: MemoryPlan
    leaving: list[str]
    fits: bool
    """Once those have gone."""
    message: str


class ModelManager:
    """Owns an entry for each known model and each further instance, and a ``Life`` for each that is loaded.

    Runs on one event loop. A model is loaded at the start, by a person, or just in time by the first request; requests
    that come meanwhile wait for the same load. ``use`` keeps it loaded; once nobody does and its time is over, it goes.
    """

    def __init__(self, config: Config, observer: Observer | None = None) -> None:
        cache = Path(config.cache) if config.cache else cache_folder()
        self._config = config
        self._observer = observer or Observer()
        self._starter_cache = cache
        self._known = Entries(config, cache)
        self._lives: dict[ModelEntry, Life] = {}
        self._timers: dict[ModelEntry, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._admission = Admission(self.entries, self._evict)
        self._usage = UsageWatch(self.entries)
        self._watching: asyncio.Task[None] | None = None
        self._draining = False
        self._stopping = False
        self._changed = asyncio.Condition()

    def entries(self) -> list[ModelEntry]:
        """Every model that the server knows, in whatever state."""
        return self._known.all()

    @property
    def just_in_time(self) -> bool:
        """Whether requests load models."""
        return self._config.just_in_time

    def resolve(self, name: str | None, task: Task | None = None) -> ModelEntry:
        """The entry a client means for a task, loaded or not (``find_entry``).

        Raises:
            ModelNotFound: with the names there are.
        """
        return self._known.resolve(name, task)

    async def refresh(self, max_age: float = REFRESH_SECONDS) -> None:
        """Look again which models there are on the disk, unless that was done less than ``max_age`` seconds ago."""
        await self._known.refresh(max_age)

    async def look_at_devices(self) -> None:
        """Makes ``ModelEntry.usage`` new, unless it is."""
        await self._usage.look()

    @contextlib.asynccontextmanager
    async def use(
        self, name: str | None, ttl_seconds: float | None = None, task: Task | None = None
    ) -> AsyncIterator[ModelEntry]:
        """The model a client means for a task, loaded if need be; it stays loaded until the context ends.

        ``ttl_seconds``: idle time that it has afterwards if a request has loaded it; infinity for ever, None as it is.

        Raises:
            ModelNotFound: no such model, or it is not loaded and just-in-time loading is off.
            InvalidRequest: it is there for another task.
            NotReady, InsufficientMemory, ModelLoadFailed, ModelUnloaded: it cannot be had now.
        """
        entry = await self._find(name, task)
        entry.num_users += 1
        self._disarm(entry)
        try:
            await self._ensure_loaded(entry, ttl_seconds, task)
            yield entry
        finally:
            entry.num_users -= 1
            if not entry.num_users:
                entry.idle_since = time.monotonic()
                self._arm(entry)

    async def load(
        self, name: str, options: LoadOptions, begun: Callable[[ModelEntry], None] = lambda entry: None
    ) -> ModelEntry:
        """Load a model for a person. Loaded already (just in time, say), it becomes that person's.

        ``begun`` is told which entry it is, before it is loaded.

        Cancelled, the load ends too, unless somebody else waits for it.

        Raises:
            InvalidRequest: it is loaded in another way already, or the identifier cannot be one.
            ModelNotFound, NotReady, InsufficientMemory, ModelLoadFailed, ModelUnloaded: as ``use``.
        """
        named = await self._find(name)
        named.check_servable()
        entry = self._known.instance(named, options.identifier)
        entry.num_users += 1
        try:
            await self._load(entry, options, begun)
        finally:
            entry.num_users -= 1
            entry.idle_since = time.monotonic()
            self._arm(entry)
        return entry

    async def _load(self, entry: ModelEntry, options: LoadOptions, begun: Callable[[ModelEntry], None]) -> None:
        await self._wait_if_ending(entry)
        began = entry not in self._lives
        if not began:
            if options.configure(entry.config) != entry.config:
                raise InvalidRequest(
                    f"Model {entry.model_id} is loaded with other settings: unload it, or give another identifier.",
                    "model",
                )
        else:
            entry.config = options.configure(entry.config)
            self._begin(entry, Origin.PERSON, force=options.force)
        if entry.is_just_in_time:
            entry.origin = Origin.PERSON
        entry.ttl_seconds = options.ttl_seconds
        self._disarm(entry)
        begun(entry)
        try:
            await self._wait_ready(entry)
        except asyncio.CancelledError:
            if began and entry.num_users == 1 and entry.state == "loading":
                self._lives[entry].begin_end(ModelUnloaded(f"The load of {entry.model_id} was cancelled."))
            raise
        _ = entry.engine  # raises if its worker has died meanwhile

    async def estimate(self, name: str, options: LoadOptions) -> Estimate:
        """What the model would take if it were loaded now. Raises as ``load``."""
        known = await self._find(name)
        known.check_servable()
        entry = self._known.new(known.known)
        entry.config = await placed(options.configure(entry.config), self._starter_cache)
        async with self._admission.starting:
            worker = await Worker.start(lambda pid, line: self._observer.said(entry, pid, line))
            try:
                plan = await self._admission.plan(entry, worker, self._admission.reserved_bytes(entry))
            finally:
                await worker.stop()
        leaving = [] if plan.fits else [e.model_id for e in self._admission.leaving(entry, plan)]
        return Estimate(entry.model_id, plan, leaving, plan.fits or bool(leaving), self._admission.explain(entry, plan))

    async def unload(self, model_id: str) -> int:
        """End a model that is loaded or loading, and its requests. Returns the bytes that are free again.

        Raises:
            ModelNotFound: there is none of this name.
        """
        wanted = model_id.lower()
        for entry, life in self._lives.items():
            if entry.model_id.lower() == wanted:
                # Shielded: who asked may go away, the model goes all the same.
                return await asyncio.shield(self._spawn(self._end(life, "was unloaded")))
        loaded = ", ".join(entry.model_id for entry in self._lives) or "none"
        raise ModelNotFound(f"Model {model_id[:200]!r} is not loaded. Loaded: {loaded}.", "instance_id")

    def problem(self) -> str | None:
        """Why the server is not healthy, or None."""
        if self._draining:
            return "draining"
        for entry in self.entries():
            begins = entry.state == "loading" and (entry.origin is Origin.START or entry.restarts)
            if begins or entry.state == "failed":
                return f"model {entry.model_id} is {entry.state}: {entry.failure or entry.stage}"
        return None

    def start(self) -> None:
        """Begins to load the models that are loaded at the start, and to watch devices; returns at once."""
        self._watching = asyncio.get_running_loop().create_task(self._usage.run(self._observer.looked))
        for entry in self._known.configured():
            self._begin(entry, Origin.START)

    async def wait_loaded(self) -> None:
        """Returns when every model is loaded that is at the start.

        Raises:
            ModelLoadFailed: one of them cannot be.
        """
        entries = self._known.configured()
        async with self._changed:
            while True:
                for entry in entries:
                    if entry.state == "failed":
                        raise ModelLoadFailed(entry.failure or "unknown reason")
                if all(entry.state != "loading" for entry in entries):
                    return
                await self._changed.wait()

    def drain(self) -> None:
        """From now on new requests are refused."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Returns when no request needs any model."""
        async with self._changed:
            await self._changed.wait_for(lambda: not any(entry.num_users for entry in self.entries()))

    async def stop(self) -> None:
        """Ends every worker. Nothing is left behind, also when a model is still loading."""
        self._draining = self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        if self._watching is not None:
            self._watching.cancel()
        reason = NotReady("The server is shutting down.", retry_after=5.0)
        await asyncio.gather(*(life.end(reason) for life in self._lives.values()))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _find(self, name: str | None, task: Task | None = None) -> ModelEntry:
        """The model for a request that comes in now. Raises NotReady while the server drains."""
        if self._draining:
            raise NotReady("The server is shutting down.", retry_after=5.0)
        return await self._known.find(name, task)

    async def _ensure_loaded(self, entry: ModelEntry, ttl_seconds: float | None, task: Task | None) -> None:
        await self._wait_if_ending(entry)
        entry.check_servable(task)
        if entry.state in ("not-loaded", "failed"):
            if not self.just_in_time:
                raise ModelNotFound(
                    f"Model {entry.model_id} is not loaded, and just-in-time loading is off. Load it with: "
                    f"lmserve load {entry.model_id}",
                    "model",
                )
            # One that was loaded at the start and failed later stays one of those.
            self._begin(entry, Origin.START if entry.state == "failed" else Origin.REQUEST)
            entry.ttl_seconds = (self._config.ttl_seconds or None) if entry.is_just_in_time else None
        if ttl_seconds is not None and entry.is_just_in_time:
            entry.ttl_seconds = None if math.isinf(ttl_seconds) else ttl_seconds
        if entry.state == "loading" and not entry.restarts:
            await self._wait_ready(entry)
        entry.check_servable(task)  # of one whose files came only now it is known now

    async def _wait_ready(self, entry: ModelEntry) -> None:
        """Raises why it cannot be loaded, to each who waits; or NotReady if that takes too long."""
        seconds = self._config.first_token_seconds
        ready = self._lives[entry].ready
        await asyncio.wait({ready}, timeout=seconds)
        if not ready.done():
            raise NotReady(
                f"Model {entry.model_id} has been loading for {seconds:g} seconds ({entry.stage}).", RETRY_SECONDS
            )
        if (error := ready.result()) is not None:
            raise copy.copy(error)

    async def _wait_if_ending(self, entry: ModelEntry) -> None:
        while (life := self._lives.get(entry)) is not None and life.is_ending:
            await life.ended()
            await asyncio.sleep(0)  # whoever was told first takes it off the list

    def _begin(self, entry: ModelEntry, origin: Origin, *, force: bool = False) -> None:
        if self._stopping:
            raise NotReady("The server is shutting down.", retry_after=5.0)
        entry.origin, entry.ttl_seconds = origin, None
        life = Life(
            entry,
            self._admission,
            self._observer,
            starter_cache=self._starter_cache,
            force=force,
            changed=lambda: self._state_changed(entry),
        )
        self._lives[entry] = life
        self._spawn(self._forget(life))

    async def _forget(self, life: Life) -> None:
        """When the life has ended, the entry is as if it had never been loaded."""
        await life.ended()
        entry = life.entry
        self._disarm(entry)
        if self._lives.get(entry) is life:
            del self._lives[entry]
        if entry.state == "not-loaded":
            self._known.put_back(entry)

    async def _evict(self, entry: ModelEntry) -> None:
        await self._end(self._lives[entry], "was unloaded to make room for another model")

    async def _end(self, life: Life, why: str) -> int:
        freed = await life.end(ModelUnloaded(f"Model {life.entry.model_id} {why}.", RETRY_SECONDS))
        logger.info("Model %s %s: %s are free again.", life.entry.model_id, why, size(freed))
        await asyncio.sleep(0)
        return freed

    def _arm(self, entry: ModelEntry) -> None:
        """An idle model's time begins."""
        if self._draining:
            self._spawn(self._tell_changed())
        self._disarm(entry)
        left = entry.ttl_left_seconds
        if left is not None:
            self._timers[entry] = asyncio.get_running_loop().call_later(left, self._expire, entry)

    def _disarm(self, entry: ModelEntry) -> None:
        if (timer := self._timers.pop(entry, None)) is not None:
            timer.cancel()

    def _expire(self, entry: ModelEntry) -> None:
        life = self._lives.get(entry)
        if entry.is_idle and life is not None and not life.is_ending:
            why = f"was idle for {entry.ttl_seconds:g} seconds and is unloaded"
            self._spawn(self._end(life, why))
            # At once: a request that comes in the same moment waits for the end, and has the model loaded again.
            life.begin_end(ModelUnloaded(f"Model {entry.model_id} {why}.", RETRY_SECONDS))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _state_changed(self, entry: ModelEntry) -> None:
        """A model that is loaded when nobody waits for it any more has its time too."""
        if entry.is_idle:
            self._arm(entry)
        await self._tell_changed()

    async def _tell_changed(self) -> None:
        async with self._changed:
            self._changed.notify_all()
