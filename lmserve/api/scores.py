"""``POST /v1/rerank`` and ``/v1/score``: how well pairs of texts go together, by a cross-encoder."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.body import ignored_header, read_request
from lmserve.api.generate import new_id
from lmserve.api.schema.embeddings import EmbeddingUsage, cut_to
from lmserve.api.schema.scores import (
    Document,
    RerankAnswer,
    RerankRequest,
    RerankResult,
    Score,
    ScoreAnswer,
    ScoreRequest,
)
from lmserve.api.settings import ApiSettings
from lmserve.api.sse import unless_disconnected
from lmserve.service.encoding import EncodingService


class ScoresEndpoint:
    """Scores pairs, and puts documents in order."""

    def __init__(self, service: EncodingService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def rerank(self, request: Request) -> Response:
        """The documents, those that suit the query best first; equal ones stay in their order."""
        wire, ignored = await read_request(request, RerankRequest, self._settings)
        return await _respond(request, self._rerank(wire), ignored)

    async def score(self, request: Request) -> Response:
        """A score for each pair, in their order."""
        wire, ignored = await read_request(request, ScoreRequest, self._settings)
        return await _respond(request, self._score(wire), ignored)

    async def _rerank(self, wire: RerankRequest) -> RerankAnswer:
        texts, number, request_id = wire.texts(), wire.num_best(), new_id("rerank")
        params = [f"documents[{i}]" for i in range(len(texts))]
        pairs = [(wire.query, text) for text in texts]
        model, scores, usage = await self._scores(request_id, wire, pairs, params)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:number]
        with_texts = wire.return_documents is not False
        results = [RerankResult(i, scores[i], Document(texts[i]) if with_texts else None) for i in best]
        return RerankAnswer(request_id, model, results, usage)

    async def _score(self, wire: ScoreRequest) -> ScoreAnswer:
        (pairs, params), request_id = wire.pairs(), new_id("score")
        model, scores, usage = await self._scores(request_id, wire, pairs, params)
        data = [Score(index, "score", score) for index, score in enumerate(scores)]
        return ScoreAnswer(request_id, "list", int(time.time()), model, data, usage)

    async def _scores(
        self,
        request_id: str,
        wire: RerankRequest | ScoreRequest,
        pairs: Sequence[tuple[str, str]],
        params: Sequence[str],
    ) -> tuple[str, list[float], EmbeddingUsage]:
        ttl, length = wire.ttl_seconds(), cut_to(wire.truncate_prompt_tokens)
        async with self._service.use(wire.model, "score", ttl) as model:
            prepared = await self._service.prepare_pairs(request_id, model, pairs, params, length)
            encoded = await self._service.run(prepared)
        return model, encoded.rows[:, 0].tolist(), EmbeddingUsage(encoded.num_tokens, encoded.num_tokens)


async def _respond(request: Request, work: Awaitable[msgspec.Struct], ignored: list[str]) -> Response:
    answer = await unless_disconnected(request.receive, work)
    return Response(msgspec.json.encode(answer), headers=ignored_header(ignored), media_type="application/json")
