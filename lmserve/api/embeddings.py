"""``POST /v1/embeddings``, and LM Studio's under ``/api/v0``."""

from __future__ import annotations

import asyncio
import base64

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.body import ignored_header, read_request
from lmserve.api.generate import new_id
from lmserve.api.schema.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import unless_disconnected
from lmserve.service.encoding import Encoded, EncodingService

INLINE_NUMBERS = 1 << 15
"""Fewer are written at once; more in a thread, vector by vector, so that other requests go on."""
_NO_VECTORS = b'"data":[]'


class EmbeddingsEndpoint:
    """Turns texts into vectors."""

    def __init__(self, service: EncodingService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        """A model that is not loaded is loaded first. When the client goes away the work ends at once."""
        wire, ignored = await read_request(request, EmbeddingRequest, self._settings)
        body = await unless_disconnected(request.receive, self._answer(wire))
        return Response(body, headers=ignored_header(ignored), media_type="application/json")

    async def _answer(self, wire: EmbeddingRequest) -> bytes:
        inputs, options, ttl = wire.inputs(), wire.options(), wire.ttl_seconds()
        async with self._service.use(wire.model, "embed", ttl) as model:
            prepared = await self._service.prepare_texts(new_id("embd"), model, inputs, options)
            encoded = await self._service.run(prepared)
        as_base64 = wire.encoding_format == "base64"
        if encoded.rows.size <= INLINE_NUMBERS:
            return render(encoded, model, as_base64=as_base64)
        return await asyncio.to_thread(render, encoded, model, as_base64=as_base64)


def render(encoded: Encoded, model: str, *, as_base64: bool) -> bytes:
    """The body of the answer. As numbers and as base64 it is the same float32, to the bit."""
    encode = msgspec.json.Encoder().encode
    frame = encode(EmbeddingList("list", [], model, EmbeddingUsage(encoded.num_tokens, encoded.num_tokens)))
    items = []
    for index, row in enumerate(encoded.rows):
        vector = base64.b64encode(row.astype("<f4").tobytes()).decode() if as_base64 else row.tolist()
        items.append(encode(Embedding("embedding", index, vector)))
    return frame.replace(_NO_VECTORS, b'"data":[' + b",".join(items) + b"]", 1)
