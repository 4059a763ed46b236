"""``POST /v1/embeddings``, as long as no embedding model can be loaded: a refusal that says so."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.body import read_request
from lmserve.api.schema.embeddings import EmbeddingRequest
from lmserve.api.settings import ApiSettings
from lmserve.errors import InvalidRequest
from lmserve.service.protocols import Models


class EmbeddingsEndpoint:
    """Refuses what language models cannot do."""

    def __init__(self, models: Models, settings: ApiSettings) -> None:
        self._models = models
        self._settings = settings

    async def create(self, request: Request) -> Response:
        body, _ = await read_request(request, EmbeddingRequest, self._settings)
        model_id = self._models.resolve(body.model).model_id
        raise InvalidRequest(f"Model {model_id} is a language model: it makes no embeddings.", "model")
