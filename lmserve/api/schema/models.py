"""``GET /v1/models``, ``/api/v0/models``, ``/version`` and ``/health``: the answers."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelItem(msgspec.Struct, frozen=True):
    """OpenAI's item and LM Studio's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["llm", "vlm", "embeddings", "reranker"]
    state: str
    max_context_length: int | None
    loaded_context_length: int | None
    capabilities: list[str]
    lane: str | None
    """Of a loaded model, how its steps are computed."""


class ModelList(msgspec.Struct, frozen=True):
    object: Literal["list"]
    data: list[ModelItem]


class ModelDetails(msgspec.Struct, frozen=True):
    """LM Studio's item. What the files do not tell is null until the model is loaded."""

    id: str
    object: Literal["model"]
    type: Literal["llm", "vlm", "embeddings", "reranker"]
    publisher: str
    arch: str | None
    compatibility_type: Literal["safetensors", "gguf"]
    quantization: str | None
    state: str
    max_context_length: int | None
    loaded_context_length: int | None
    capabilities: list[str]


class ModelDetailsList(msgspec.Struct, frozen=True):
    object: Literal["list"]
    data: list[ModelDetails]


class ModelVersion(msgspec.Struct, frozen=True):
    id: str
    device: str
    dtype: str


class Version(msgspec.Struct, frozen=True):
    lmserve: str
    python: str
    torch: str | None
    transformers: str | None
    models: list[ModelVersion]


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    status: Literal["ok", "unavailable"]
    reason: str | None = None
