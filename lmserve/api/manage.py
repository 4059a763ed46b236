"""``/api/v1/models``: LM Studio's REST API v1, by which people list, load and unload models."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from lmserve.api.body import ignored_header, read_request
from lmserve.api.openapi import Operation
from lmserve.api.schema.manage import (
    Capabilities,
    Device,
    Instance,
    InstanceConfig,
    LoadAnswer,
    LoadEvent,
    LoadRequest,
    ManagedModel,
    ManagedModels,
    MemoryEstimate,
    Quantization,
    UnloadAnswer,
    UnloadRequest,
    V1Type,
)
from lmserve.api.schema.numbers import integer
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import EventStream, event, unless_disconnected
from lmserve.errors import InvalidRequest
from lmserve.models.entry import LoadOptions, ModelEntry
from lmserve.models.manager import ModelManager
from lmserve.models.usage import WorkerUsage, percent
from lmserve.service.request import context_length

BASE = "/api/v1/models"
PROGRESS_SECONDS = 0.1
"""How often a load's stream looks how far it is."""
MAX_LENGTH = 2**31 - 1
MAX_PARALLEL = 4096


class ManageEndpoint:
    """Lists, loads and unloads models."""

    def __init__(self, manager: ModelManager, settings: ApiSettings) -> None:
        self._manager = manager
        self._settings = settings

    def operations(self) -> Sequence[Operation]:
        """The paths, for the application's table."""
        return [
            Operation("GET", BASE, self.list, "All models and their instances", answer=ManagedModels),
            Operation(
                "POST",
                f"{BASE}/load",
                self.load,
                "Load a model, or say what it would take",
                body=LoadRequest,
                answer=LoadAnswer,
                other_answer=MemoryEstimate,
                chunk=LoadEvent,
            ),
            Operation("POST", f"{BASE}/unload", self.unload, "Unload one", body=UnloadRequest, answer=UnloadAnswer),
        ]

    async def list(self, _: Request) -> Response:
        """Every known model once, with its instances."""
        await self._manager.refresh()
        await self._manager.look_at_devices()
        models: dict[str, list[ModelEntry]] = {}
        for entry in self._manager.entries():
            models.setdefault(entry.known.model_id, []).append(entry)
        return _json(ManagedModels([_model(entries) for entries in models.values()]), [])

    async def load(self, request: Request) -> ASGIApp:
        """Answers when the model is loaded. When the client goes away, the load ends with it."""
        body, ignored = await read_request(request, LoadRequest, self._settings)
        options = _options(body)
        if body.estimate_only:
            return _json(await unless_disconnected(request.receive, self._estimate(body, options)), ignored)
        if body.stream:
            return EventStream(
                self._events(body, options),
                keep_alive=self._settings.keep_alive_seconds,
                headers=ignored_header(ignored),
            )
        return _json(await unless_disconnected(request.receive, self._load(body, options)), ignored)

    async def unload(self, request: Request) -> Response:
        """Ends the instance and what it was asked for."""
        body, ignored = await read_request(request, UnloadRequest, self._settings)
        return _json(UnloadAnswer(body.instance_id, await self._manager.unload(body.instance_id)), ignored)

    async def _load(
        self, body: LoadRequest, options: LoadOptions, begun: Callable[[ModelEntry], None] = lambda entry: None
    ) -> LoadAnswer:
        began = time.monotonic()
        entry = await self._manager.load(body.model, options, begun)
        await self._manager.look_at_devices()
        return LoadAnswer(
            type=_type(entry),
            instance_id=entry.model_id,
            load_time_seconds=round(time.monotonic() - began, 3),
            status="loaded",
            load_config=_config(entry) if body.echo_load_config else None,
            memory_bytes=entry.own_bytes,
        )

    async def _events(self, body: LoadRequest, options: LoadOptions) -> AsyncGenerator[bytes, None]:
        """What the load is doing whenever that changes, and its end."""
        encode = msgspec.json.Encoder().encode
        begun: list[ModelEntry] = []
        loading = asyncio.create_task(self._load(body, options, begun.append))
        said = None
        try:
            while not (await asyncio.wait({loading}, timeout=PROGRESS_SECONDS))[0]:
                for entry in begun:
                    news = LoadEvent(
                        type="model_load.progress",
                        instance_id=entry.model_id,
                        progress=entry.progress,
                        stage=entry.stage,
                    )
                    if news != said:
                        said = news
                        yield event(encode(news))
            result = loading.result()
            end = LoadEvent(type="model_load.end", instance_id=result.instance_id, progress=1.0, result=result)
            yield event(encode(end))
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)

    async def _estimate(self, body: LoadRequest, options: LoadOptions) -> MemoryEstimate:
        estimate = await self._manager.estimate(body.model, options)
        plan = estimate.plan
        return MemoryEstimate(
            model=estimate.model_id,
            device=plan.device,
            dtype=plan.dtype,
            context_length=plan.max_model_len,
            parallel=plan.max_num_seqs,
            weights_bytes=plan.weight_bytes,
            kv_cache_bytes=plan.kv_cache_bytes,
            kv_cache_tokens=plan.kv_cache_tokens,
            activations_bytes=plan.activation_bytes,
            fixed_bytes=plan.fixed_bytes,
            total_bytes=plan.total_bytes,
            free_bytes=plan.free_bytes,
            would_unload=estimate.leaving,
            fits=estimate.fits,
            message=estimate.message,
        )


def _options(body: LoadRequest) -> LoadOptions:
    if body.ttl is not None and not 0 < body.ttl < math.inf:
        raise InvalidRequest(f"ttl must be above 0, got {body.ttl}.", "ttl")
    return LoadOptions(
        identifier=body.identifier,
        ttl_seconds=body.ttl,
        context_length=integer(body.context_length, "context_length", 1, MAX_LENGTH),
        parallel=integer(body.parallel, "parallel", 1, MAX_PARALLEL),
        eval_batch_size=integer(body.eval_batch_size, "eval_batch_size", 1, MAX_LENGTH),
        force=bool(body.force),
    )


def _model(entries: list[ModelEntry]) -> ManagedModel:
    """A known model, from its entries: one for each instance."""
    known = entries[0].known
    facts = known.facts
    publisher, _, name = known.model_id.rpartition("/")
    capabilities = entries[0].capabilities
    quantization = None
    if facts is not None and facts.quantization is not None:
        quantization = Quantization(facts.quantization, facts.bits_per_weight)
    return ManagedModel(
        type=_type(entries[0]),
        publisher=publisher,
        key=known.model_id,
        display_name=re.split(r"[/\\]", known.location.rstrip("/"))[-1].removesuffix(".gguf") or name,
        architecture=None if facts is None else facts.model_type or facts.architecture,
        quantization=quantization,
        size_bytes=None if facts is None else facts.size_bytes,
        params_string=None if facts is None else _short(facts.num_parameters),
        loaded_instances=[_instance(entry) for entry in entries if entry.is_live],
        max_context_length=None if facts is None else facts.context_length,
        format=None if facts is None else facts.format,
        capabilities=Capabilities("vision" in capabilities, "tools" in capabilities),
        path=known.location,
        source=known.source,
        problem=known.problem or entries[0].failure,
    )


def _instance(entry: ModelEntry) -> Instance:
    info = entry.info
    stats = None if info is None else entry.engine.stats
    num_running = 0 if stats is None else stats.num_running
    busy, usage = entry.num_users > 0, entry.usage
    assert entry.state != "not-loaded"
    return Instance(
        id=entry.model_id,
        config=None if info is None else _config(entry),
        state=entry.state,
        status=entry.state if entry.state != "loaded" else "generating" if busy else "idle",
        stage=entry.stage if entry.state == "loading" else "",
        progress=1.0 if entry.state == "loaded" else entry.progress,
        num_running=num_running,
        num_queued=0 if stats is None else stats.num_waiting,
        just_in_time=entry.is_just_in_time,
        ttl_seconds=entry.ttl_seconds,
        ttl_left_seconds=entry.ttl_left_seconds,
        memory_bytes=entry.resident_bytes,
        device=_device(usage),
        device_memory_bytes=entry.own_bytes,
        cpu_percent=None if usage is None else percent(usage.cpu),
        estimated_bytes=0 if entry.plan is None else entry.plan.total_bytes,
        load_time_seconds=0.0 if info is None else info.load_seconds,
        lane="" if info is None else info.lane,
        lane_reason="" if info is None else info.lane_reason,
        restarts=entry.restarts,
        failure=entry.failure,
    )


def _device(usage: WorkerUsage | None) -> Device | None:
    if usage is None or usage.device is None:
        return None
    device = usage.device
    return Device(device.name, device.total_bytes, device.used_bytes, percent(device.utilization))


def _config(entry: ModelEntry) -> InstanceConfig | None:
    info = entry.info
    if info is None:  # unloaded again in the same moment
        return None
    return InstanceConfig(
        context_length=context_length(info),
        eval_batch_size=info.max_num_batched_tokens,
        parallel=info.max_num_seqs,
        kv_cache_tokens=info.kv_cache_tokens,
        device=info.device,
        dtype=info.dtype,
    )


def _type(entry: ModelEntry) -> V1Type:
    kind = "llm" if entry.facts is None else entry.facts.type
    return "embedding" if kind == "embeddings" else "reranker" if kind == "reranker" else "llm"


def _short(count: int | None) -> str | None:
    """A number of parameters for people: 135M, 1.5B."""
    if count is None:
        return None
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}".removesuffix(".0") + name if count < 10 * unit else f"{count / unit:.0f}{name}"
    return str(count)


def _json(answer: msgspec.Struct, ignored: list[str]) -> Response:
    return Response(msgspec.json.encode(answer), headers=ignored_header(ignored), media_type="application/json")
