"""Whether a model may be loaded now, and what has to go for it.

A worker says what a model would take (``MemoryPlan``) before it reads any weight. What loaded models have been promised
and not taken yet is kept for them. When memory is short, models that requests have loaded and that nobody uses go, the
least recently used first, and only if that helps; what a person loaded stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from lmserve.errors import InsufficientMemory, ModelLoadFailed
from lmserve.models.entry import ModelEntry
from lmserve.models.worker_process import Worker
from lmserve.runtime.interface import MemoryPlan

RETRY_SECONDS = 10.0
PLAN_SECONDS = 120.0
MAX_STARTING = 4
"""Workers at once that nobody has found room for yet."""


class Admission:
    """Owns the order in which models get memory: one is decided on at a time.

    ``starting`` is held by whoever has a worker that has not been admitted: such a process takes memory too.
    """

    def __init__(
        self, entries: Callable[[], Sequence[ModelEntry]], unload: Callable[[ModelEntry], Awaitable[None]]
    ) -> None:
        self._entries = entries
        self._unload = unload
        self._turn = asyncio.Lock()
        self.starting = asyncio.Semaphore(MAX_STARTING)

    async def admit(self, entry: ModelEntry, worker: Worker, *, force: bool = False) -> int:
        """Makes room if need be; sets the entry's plan. Returns the bytes that have to be left for others.

        ``force``: whatever the plan says, and nothing is kept for others.

        Raises:
            InsufficientMemory: with the numbers.
            ModelLoadFailed: it could not be loaded into any memory.
        """
        async with self._turn:
            plan = await self.plan(entry, worker, reserved := 0 if force else self.reserved_bytes(entry))
            while not plan.fits and not force:
                leaving = self.leaving(entry, plan)
                if not leaving:
                    raise InsufficientMemory(self.explain(entry, plan), RETRY_SECONDS)
                await self._unload(leaving[0])
                plan = await self.plan(entry, worker, reserved := self.reserved_bytes(entry))
            entry.plan = plan
            return reserved

    @staticmethod
    async def plan(entry: ModelEntry, worker: Worker, reserved_bytes: int) -> MemoryPlan:
        """The worker's plan. It may ask the hub for a configuration: not for ever, for others wait."""
        planning = asyncio.ensure_future(worker.plan(entry.worker_config, reserved_bytes))
        try:
            await asyncio.wait({planning}, timeout=PLAN_SECONDS)
            if not planning.done():
                raise ModelLoadFailed(f"Model {entry.model_id} was not planned within {PLAN_SECONDS:g} seconds.")
            return planning.result()
        finally:
            planning.cancel()

    def reserved_bytes(self, newcomer: ModelEntry) -> int:
        """What the others may still take of the device, as far as it is known which that will be."""
        wanted = newcomer.config.device
        others = [(e, e.plan) for e in self._entries() if e is not newcomer and e.plan is not None]
        return sum(entry.promised_bytes for entry, plan in others if wanted in ("auto", device_type(plan)))

    def leaving(self, newcomer: ModelEntry, plan: MemoryPlan) -> list[ModelEntry]:
        """The models that would be unloaded so that it fits; none if it fits as it is, or would not fit even then."""
        if plan.share_bytes and plan.peak_bytes > plan.share_bytes:
            return []
        idle = [e for e in self._others_on(plan, newcomer) if e.is_idle and e.is_just_in_time]
        idle.sort(key=lambda entry: entry.idle_since)
        missing = plan.peak_bytes - plan.free_bytes
        leaving = []
        for entry in idle:
            if missing <= 0:
                break
            assert entry.plan is not None
            missing -= entry.plan.total_bytes
            leaving.append(entry)
        return leaving if missing <= 0 else []

    def explain(self, newcomer: ModelEntry, plan: MemoryPlan) -> str:
        """The figures in a sentence or two."""
        needs = (
            f"Model {newcomer.model_id} needs {size(plan.total_bytes)} on {plan.device} "
            f"(weights {size(plan.weight_bytes)} in {plan.dtype}, KV cache {size(plan.kv_cache_bytes)} for "
            f"{plan.kv_cache_tokens:,} tokens, activations {size(plan.activation_bytes)}, fixed "
            f"{size(plan.fixed_bytes)}), {_for_a_while(plan)}and {size(plan.free_bytes)} {_limit(plan)}"
        )
        if plan.fits:
            return f"{needs}: it fits."
        if leaving := self.leaving(newcomer, plan):
            return f"{needs}: it fits once {', '.join(entry.model_id for entry in leaving)} is unloaded."
        staying = [_why_it_stays(e) for e in self._others_on(plan, newcomer)]
        loaded = f"Loaded: {'; '.join(staying)}." if staying else "Nothing is loaded."
        return f"{needs}: it does not fit. {loaded}{_advice(plan, bool(staying))}"

    def _others_on(self, plan: MemoryPlan, newcomer: ModelEntry) -> list[ModelEntry]:
        """The others that have, or may take, memory of the same kind of device."""
        others = [(e, e.plan) for e in self._entries() if e is not newcomer and e.plan is not None]
        return [entry for entry, its in others if device_type(its) == device_type(plan)]


def device_type(plan: MemoryPlan) -> str:
    return plan.device.partition(":")[0]


def _for_a_while(plan: MemoryPlan) -> str:
    if plan.peak_bytes == plan.total_bytes:
        return ""
    return f"{size(plan.peak_bytes)} while its weights are brought into fewer bits, "


def _limit(plan: MemoryPlan) -> str:
    return f"are free of the {size(plan.share_bytes)} that one model may have" if plan.share_bytes else "are free"


def _advice(plan: MemoryPlan, others: bool) -> str:
    """A GPU's first model takes all of its share for its KV cache, which need not be so much."""
    if not plan.share_bytes:
        return ""
    if plan.peak_bytes > plan.share_bytes:
        return " gpu_memory_utilization says how much of the GPU one model may have."
    return " With a lower gpu_memory_utilization or kv_cache_memory they would leave more." if others else ""


def _why_it_stays(entry: ModelEntry) -> str:
    assert entry.plan is not None
    reason = "loaded by a person" if not entry.is_just_in_time else "idle" if entry.is_idle else "in use"
    return f"{entry.model_id} ({size(entry.plan.total_bytes)}, {reason})"


def size(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.2f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
