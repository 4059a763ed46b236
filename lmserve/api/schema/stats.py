"""What LM Studio's REST API adds to OpenAI's answers."""

from __future__ import annotations

import msgspec


class Stats(msgspec.Struct, frozen=True):
    tokens_per_second: float
    time_to_first_token: float
    """Seconds."""
    generation_time: float
    """Seconds from the first token to the last."""
    stop_reason: str


class ModelInfo(msgspec.Struct, frozen=True):
    arch: str
    quant: str
    format: str
    context_length: int


class Runtime(msgspec.Struct, frozen=True):
    name: str
    version: str
    supported_formats: list[str]


class WithStats(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an answer under /api/v0; absent elsewhere."""

    stats: Stats | msgspec.UnsetType = msgspec.UNSET
    model_info: ModelInfo | msgspec.UnsetType = msgspec.UNSET
    runtime: Runtime | msgspec.UnsetType = msgspec.UNSET
