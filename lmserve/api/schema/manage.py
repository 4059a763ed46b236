"""LM Studio's REST API v1 about models: list, load, unload, download. Fields of ours stand beside its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lmserve.api.schema.fields import honoured, ignored, refused
from lmserve.api.schema.numbers import Int

V1Type = Literal["llm", "embedding", "reranker"]
_ONE_TO_MANY = {"type": ["integer", "null"], "minimum": 1}


class Quantization(msgspec.Struct, frozen=True):
    name: str
    bits_per_weight: float | None


class Capabilities(msgspec.Struct, frozen=True):
    vision: bool
    trained_for_tool_use: bool


class InstanceConfig(msgspec.Struct, frozen=True):
    """What an instance was loaded with. LM Studio's names; the last three are ours."""

    context_length: int
    eval_batch_size: int
    """Tokens that one step may compute."""
    parallel: int
    """Sequences that run at once."""
    kv_cache_tokens: int
    device: str
    dtype: str


class Device(msgspec.Struct, frozen=True):
    """Where an instance runs, whoever else does, as of the last two seconds or so."""

    name: str
    """cpu, cuda:0, …"""
    memory_total_bytes: int
    memory_used_bytes: int | None
    """By all programs; None: not known."""
    utilization_percent: float | None
    """How busy it is; None: not known."""


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One loaded (or loading) model. All but ``id`` and ``config`` is ours."""

    id: str
    config: InstanceConfig | None
    """None until it is loaded."""
    state: Literal["loading", "loaded", "failed"]
    status: Literal["loading", "idle", "generating", "failed"]
    stage: str
    """What a loading instance is doing, for people."""
    progress: float
    """In [0, 1], of the load."""
    num_running: int
    num_queued: int
    just_in_time: bool
    """Loaded by a request, not by a person."""
    ttl_seconds: float | None
    """Idle time after which it is unloaded; None is never."""
    ttl_left_seconds: float | None
    """None while a request runs, too."""
    memory_bytes: int
    """Resident memory of its worker process now; 0 until there is one."""
    device: Device | None
    """None until it is known."""
    device_memory_bytes: int
    """What its worker has of its device's memory; on a CPU that is ``memory_bytes``."""
    cpu_percent: float | None
    """What its worker takes of the time of all processors; None until there is one."""
    estimated_bytes: int
    """What it may take when it is full; 0 until that is known."""
    load_time_seconds: float
    lane: str
    """How its steps are computed: ``native``, ``packed``, ``state`` or ``serial``."""
    lane_reason: str
    """Why no faster lane would do; empty if it is the fastest."""
    restarts: int
    failure: str | None


class ManagedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the server knows, and its instances. ``path`` and ``source`` are ours."""

    type: V1Type
    publisher: str
    key: str
    display_name: str
    architecture: str | None
    quantization: Quantization | None
    size_bytes: int | None
    params_string: str | None
    """1.5B, 135M, …"""
    loaded_instances: list[Instance]
    max_context_length: int | None
    format: Literal["safetensors", "gguf", "pytorch"] | None
    capabilities: Capabilities
    path: str
    source: Literal["configured", "alias", "models_dir", "hub_cache", "starter"]
    problem: str | None
    """Why it cannot be loaded, if that is known."""


class ManagedModels(msgspec.Struct, frozen=True):
    models: list[ManagedModel]


class LoadRequest(msgspec.Struct, kw_only=True):
    """``POST /api/v1/models/load``."""

    model: Annotated[str, honoured("the model's key, a unique end of it, or an alias")]
    identifier: Annotated[
        str | None, honoured("the name that clients use; another one loads the model once more", default="the key")
    ] = None
    ttl: Annotated[
        float | None, honoured("seconds of idleness after which it is unloaded", default="never", allowed="above 0")
    ] = None
    context_length: Annotated[
        Int, honoured("tokens of prompt and output together", default="see --max-model-len", schema=_ONE_TO_MANY)
    ] = None
    parallel: Annotated[
        Int, honoured("sequences that run at once", default="see --max-num-seqs", schema=_ONE_TO_MANY)
    ] = None
    eval_batch_size: Annotated[
        Int, honoured("tokens that one step computes", default="see --max-num-batched-tokens", schema=_ONE_TO_MANY)
    ] = None
    echo_load_config: Annotated[bool | None, honoured("the answer has load_config", default="false")] = None
    estimate_only: Annotated[
        bool | None, honoured("load nothing; the answer is the memory that it would take", default="false")
    ] = None
    force: Annotated[
        bool | None, honoured("load it although the estimate says that memory is short", default="false")
    ] = None
    stream: Annotated[
        bool | None, honoured("answer with server-sent events that say how far it is", default="false")
    ] = None
    flash_attention: Annotated[Any, ignored("boolean", "the attention backend is chosen at the server's start")] = None
    offload_kv_cache_to_gpu: Annotated[Any, ignored("boolean", "the KV cache is where the model is")] = None
    num_experts: Annotated[Any, refused("integer", "a model is run with the experts that it was made with")] = None


class MemoryEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a model would take, term by term, in bytes."""

    model: str
    device: str
    dtype: str
    context_length: int
    parallel: int
    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    activations_bytes: int
    fixed_bytes: int
    total_bytes: int
    free_bytes: int
    """What is free on the device now, less what the loaded models may still take of it."""
    would_unload: list[str]
    """Idle models that would be unloaded to make room."""
    fits: bool
    message: str
    """The figures in one sentence."""


class LoadAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: V1Type
    instance_id: str
    load_time_seconds: float
    status: Literal["loaded"]
    load_config: InstanceConfig | None = None
    memory_bytes: int = 0
    """Memory of its device that the worker has after the load."""


class LoadEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of a load's stream: any number with ``progress``, and one with ``result`` at the end."""

    type: Literal["model_load.progress", "model_load.end"]
    instance_id: str
    progress: float = 0.0
    stage: str = ""
    result: LoadAnswer | None = None


class UnloadRequest(msgspec.Struct, kw_only=True):
    """``POST /api/v1/models/unload``."""

    instance_id: Annotated[str, honoured("the identifier of a loaded model")]


class UnloadAnswer(msgspec.Struct, frozen=True):
    instance_id: str
    freed_bytes: int
    """Memory of its device that the worker had, and that is back."""


class DownloadRequest(msgspec.Struct, kw_only=True):
    """``POST /api/v1/models/download``."""

    model: Annotated[str, honoured("a name on the hub: publisher/model")]
    revision: Annotated[str | None, honoured("branch, tag or commit", default="main")] = None
    quantization: Annotated[
        str | None, honoured("of a repository with several GGUF files, the one with this in its name: Q4_K_M")
    ] = None


class DownloadJob(msgspec.Struct, frozen=True, kw_only=True):
    """LM Studio's fields, and ``model``, ``path``, ``error``."""

    job_id: str
    model: str
    status: Literal["downloading", "completed", "already_downloaded", "failed", "cancelled"]
    total_size_bytes: int
    """0 until it is known."""
    downloaded_bytes: int
    bytes_per_second: float
    started_at: str
    """ISO 8601, UTC."""
    completed_at: str | None
    estimated_completion: str | None
    path: str | None
    """The folder, once it is there."""
    error: str | None
