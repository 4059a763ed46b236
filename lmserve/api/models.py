"""``GET /v1/models`` and ``GET /v1/models/{id}``, and LM Studio's under ``/api/v0``."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.schema.models import ModelDetails, ModelDetailsList, ModelItem, ModelList
from lmserve.api.stats import file_format, quantization
from lmserve.errors import ModelNotFound
from lmserve.service.generation import GenerationService
from lmserve.service.protocols import ModelEntry, Models
from lmserve.service.request import context_length


class ModelsEndpoint:
    """Says which models are loaded."""

    def __init__(self, models: Models, service: GenerationService) -> None:
        self._models = models
        self._service = service

    async def list(self, _: Request) -> Response:
        items = [self._item(entry) for entry in self._models.entries() if entry.state == "loaded"]
        return Response(msgspec.json.encode(ModelList("list", items)), media_type="application/json")

    async def retrieve(self, request: Request) -> Response:
        """By exact id, in whatever state the model is."""
        entry = self._entry(request.path_params["model_id"])
        return Response(msgspec.json.encode(self._item(entry)), media_type="application/json")

    async def details(self, _: Request) -> Response:
        """All models, in whatever state, as LM Studio lists them."""
        items = [_details(entry) for entry in self._models.entries()]
        return Response(msgspec.json.encode(ModelDetailsList("list", items)), media_type="application/json")

    async def detail(self, request: Request) -> Response:
        """One of them, by exact id."""
        entry = self._entry(request.path_params["model_id"])
        return Response(msgspec.json.encode(_details(entry)), media_type="application/json")

    def _entry(self, model_id: str) -> ModelEntry:
        entries = {entry.model_id: entry for entry in self._models.entries()}
        if model_id not in entries:
            raise ModelNotFound(f"Model {model_id!r} is not loaded. Your models: {', '.join(entries)}.", "model")
        return entries[model_id]

    def _item(self, entry: ModelEntry) -> ModelItem:
        info = entry.info
        return ModelItem(
            id=entry.model_id,
            object="model",
            created=entry.created,
            owned_by="lmserve",
            type="llm",
            state=entry.state,
            max_context_length=None if info is None else info.max_model_len,
            loaded_context_length=None if info is None else context_length(info),
            capabilities=self._service.capabilities(entry),
        )


def _details(entry: ModelEntry) -> ModelDetails:
    info = entry.info
    return ModelDetails(
        id=entry.model_id,
        object="model",
        type="llm",
        publisher=entry.model_id.rpartition("/")[0],
        arch=None if info is None else info.model_type or info.architecture,
        compatibility_type=file_format(entry),
        quantization=None if info is None else quantization(info.dtype),
        state=entry.state,
        max_context_length=None if info is None else info.max_model_len,
        loaded_context_length=None if info is None else context_length(info),
    )
