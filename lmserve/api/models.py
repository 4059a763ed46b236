"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.schema.models import ModelItem, ModelList
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
        model_id = request.path_params["model_id"]
        entries = {entry.model_id: entry for entry in self._models.entries()}
        if model_id not in entries:
            raise ModelNotFound(f"Model {model_id!r} is not loaded. Your models: {', '.join(entries)}.", "model")
        return Response(msgspec.json.encode(self._item(entries[model_id])), media_type="application/json")

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
