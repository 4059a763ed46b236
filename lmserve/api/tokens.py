"""``POST /tokenize``, ``/detokenize`` and ``/apply-template``: what a model would receive, without asking it."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.body import ignored_header, read_request
from lmserve.api.schema.tokens import (
    ApplyTemplateAnswer,
    ApplyTemplateRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from lmserve.api.settings import ApiSettings
from lmserve.errors import InvalidRequest
from lmserve.service.generation import GenerationService


class TokensEndpoint:
    """Turns text into tokens, tokens into text, and chats into both."""

    def __init__(self, service: GenerationService, settings: ApiSettings) -> None:
        self._service = service
        self._settings = settings

    async def tokenize(self, request: Request) -> Response:
        body, ignored = await read_request(request, TokenizeRequest, self._settings)
        text, chat = body.text(), body.chat()
        async with self._service.use(body.model) as model:
            if chat is not None:
                tokens = (await self._service.render(model, chat)).token_ids
            else:
                special = body.add_special_tokens is not False
                tokens = await self._service.tokenize(model, text or "", add_special_tokens=special)
            strings = await self._service.token_strings(model, tokens) if body.return_token_strs else None
            limit = self._service.context_length(model)
        return _json(TokenizeAnswer(len(tokens), limit, tokens, strings), ignored)

    async def detokenize(self, request: Request) -> Response:
        body, ignored = await read_request(request, DetokenizeRequest, self._settings)
        async with self._service.use(body.model) as model:
            text = await self._service.detokenize(model, body.tokens)
        return _json(DetokenizeAnswer(text), ignored)

    async def apply_template(self, request: Request) -> Response:
        body, ignored = await read_request(request, ApplyTemplateRequest, self._settings)
        chat = body.chat()
        if chat is None:
            raise InvalidRequest("messages is required.", "messages")
        async with self._service.use(body.model) as model:
            prompt = await self._service.render(model, chat)
        assert prompt.text is not None, "a rendered chat has a text"
        return _json(ApplyTemplateAnswer(prompt.text, len(prompt.token_ids), prompt.token_ids), ignored)


def _json(answer: msgspec.Struct, ignored: list[str]) -> Response:
    return Response(msgspec.json.encode(answer), headers=ignored_header(ignored), media_type="application/json")
