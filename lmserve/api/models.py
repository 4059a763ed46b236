"""``GET /v1/models`` and ``GET /v1/models/{id}``, and LM Studio's under ``/api/v0``."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.schema.models import ModelDetails, ModelDetailsList, ModelItem, ModelList
from lmserve.api.stats import file_format, quantization
from lmserve.errors import ModelNotFound
from lmserve.service.protocols import ModelEntry, Models
from lmserve.service.request import context_length


class ModelsEndpoint:
    """Says which models there are."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def list(self, _: Request) -> Response:
        """The loaded ones; with just-in-time loading the known ones too, for they can be asked."""
        await self._models.refresh()
        entries = [e for e in self._models.entries() if e.state == "loaded" or self._models.just_in_time]
        return _json(ModelList("list", [_item(entry) for entry in entries]))

    async def retrieve(self, request: Request) -> Response:
        """By id, in whatever state the model is."""
        return _json(_item(await self._entry(request.path_params["model_id"])))

    async def details(self, _: Request) -> Response:
        """All models, in whatever state, as LM Studio lists them."""
        await self._models.refresh()
        return _json(ModelDetailsList("list", [_details(entry) for entry in self._models.entries()]))

    async def detail(self, request: Request) -> Response:
        """One of them, by id."""
        return _json(_details(await self._entry(request.path_params["model_id"])))

    async def _entry(self, model_id: str) -> ModelEntry:
        await self._models.refresh()
        entries = {entry.model_id.lower(): entry for entry in self._models.entries()}
        if model_id.lower() not in entries:
            raise ModelNotFound(f"Model {model_id[:200]!r} is not known. Your models: {', '.join(entries)}.", "model")
        return entries[model_id.lower()]


def _item(entry: ModelEntry) -> ModelItem:
    info, facts = entry.info, entry.facts
    return ModelItem(
        id=entry.model_id,
        object="model",
        created=entry.created,
        owned_by="lmserve",
        type="llm" if facts is None else facts.type,
        state=entry.state,
        max_context_length=_max_context_length(entry),
        loaded_context_length=None if info is None else context_length(info),
        capabilities=[*entry.capabilities],
        lane=None if info is None else info.lane,
    )


def _details(entry: ModelEntry) -> ModelDetails:
    info, facts = entry.info, entry.facts
    arch = facts.model_type or facts.architecture if facts is not None else None
    quant = facts.quantization if facts is not None else None
    if info is not None:
        arch, loaded = arch or info.model_type or info.architecture, quantization(info.dtype)
        quant = loaded if loaded.startswith("INT") or not quant else quant
    return ModelDetails(
        id=entry.model_id,
        object="model",
        type="llm" if facts is None else facts.type,
        publisher=entry.model_id.rpartition("/")[0],
        arch=arch,
        compatibility_type=file_format(entry),
        quantization=quant,
        state=entry.state,
        max_context_length=_max_context_length(entry),
        loaded_context_length=None if info is None else context_length(info),
        capabilities=[*entry.capabilities],
    )


def _max_context_length(entry: ModelEntry) -> int | None:
    """What the model was made for; of a loaded one that does not say, what it was loaded with."""
    if entry.facts is not None and entry.facts.context_length is not None:
        return entry.facts.context_length
    return None if entry.info is None else entry.info.max_model_len


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
