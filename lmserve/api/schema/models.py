"""``GET /v1/models``, ``/version`` and ``/health``: the answers."""

from __future__ import annotations

from typing import Literal

import msgspec


class ModelItem(msgspec.Struct, frozen=True):
    """OpenAI's item and LM Studio's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    type: Literal["llm"]
    state: str
    max_context_length: int | None
    loaded_context_length: int | None
    capabilities: list[str]


class ModelList(msgspec.Struct, frozen=True):
    object: Literal["list"]
    data: list[ModelItem]


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
