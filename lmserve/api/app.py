"""The HTTP application: routes, middleware, and what becomes of exceptions."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmserve.api.body import IGNORED_HEADER
from lmserve.api.chat import CHAT
from lmserve.api.completions import COMPLETION
from lmserve.api.embeddings import EmbeddingsEndpoint
from lmserve.api.errors import error_response
from lmserve.api.generate import GenerationEndpoint
from lmserve.api.health import HealthEndpoint
from lmserve.api.log import LogEndpoint
from lmserve.api.middleware import REQUEST_ID_HEADER, ApiKeyMiddleware, ErrorMiddleware, RequestIdMiddleware
from lmserve.api.models import ModelsEndpoint
from lmserve.api.openapi import OpenApiEndpoint, Operation
from lmserve.api.schema.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from lmserve.api.schema.completions import Completion, CompletionRequest
from lmserve.api.schema.embeddings import EmbeddingRequest
from lmserve.api.schema.errors import ErrorAnswer
from lmserve.api.schema.models import Health, ModelItem, ModelList, Version
from lmserve.api.schema.tokens import (
    ApplyTemplateAnswer,
    ApplyTemplateRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from lmserve.api.settings import ApiSettings
from lmserve.api.tokens import TokensEndpoint
from lmserve.errors import LMServeError
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.protocols import Models


def create_app(service: GenerationService, models: Models, log: LogStream, config: ApiSettings) -> Starlette:
    """The application. It owns nothing: models, threads and the log live as long as their maker wants."""
    operations = _operations(service, models, log, config)
    document = OpenApiEndpoint(operations, with_keys=bool(config.api_key)).document
    routes = [Route(o.path, o.endpoint, methods=[o.method]) for o in operations]
    routes.append(Route("/openapi.json", document, methods=["GET"]))
    handlers = {HTTPException: _refuse, LMServeError: _refuse}
    app = Starlette(routes=routes, middleware=_middleware(config), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _operations(service: GenerationService, models: Models, log: LogStream, config: ApiSettings) -> list[Operation]:
    """Every path: what is routed is what is documented."""
    tokens = TokensEndpoint(service, config)
    model_list = ModelsEndpoint(models, service)
    health = HealthEndpoint(models)
    generating = []
    for base, with_stats in (("/v1", False), ("/api/v0", True)):
        chat = GenerationEndpoint(service, config, CHAT, with_stats=with_stats)
        completion = GenerationEndpoint(service, config, COMPLETION, with_stats=with_stats)
        note = ", with statistics as in LM Studio's REST API" if with_stats else ""
        generating += [
            Operation(
                method="POST",
                path=f"{base}/chat/completions",
                endpoint=chat.create,
                summary=f"Answer a chat{note}",
                body=ChatCompletionRequest,
                answer=ChatCompletion,
                chunk=ChatCompletionChunk,
            ),
            Operation(
                method="POST",
                path=f"{base}/completions",
                endpoint=completion.create,
                summary=f"Continue a text{note}",
                body=CompletionRequest,
                answer=Completion,
                chunk=Completion,
            ),
        ]
    return [
        *generating,
        Operation(
            method="POST",
            path="/v1/embeddings",
            endpoint=EmbeddingsEndpoint(models, config).create,
            summary="Not offered yet: refused",
            body=EmbeddingRequest,
            answer=ErrorAnswer,
        ),
        Operation(
            method="GET",
            path="/v1/models",
            endpoint=model_list.list,
            summary="The loaded models",
            answer=ModelList,
        ),
        Operation(
            method="GET",
            path="/v1/models/{model_id:path}",
            endpoint=model_list.retrieve,
            summary="One model, by its id",
            answer=ModelItem,
        ),
        Operation(
            method="POST",
            path="/tokenize",
            endpoint=tokens.tokenize,
            summary="The tokens of a text or of a chat",
            body=TokenizeRequest,
            answer=TokenizeAnswer,
        ),
        Operation(
            method="POST",
            path="/detokenize",
            endpoint=tokens.detokenize,
            summary="The text of tokens",
            body=DetokenizeRequest,
            answer=DetokenizeAnswer,
        ),
        Operation(
            method="POST",
            path="/apply-template",
            endpoint=tokens.apply_template,
            summary="What the model receives of a chat",
            body=ApplyTemplateRequest,
            answer=ApplyTemplateAnswer,
        ),
        Operation(
            method="GET",
            path="/health",
            endpoint=health.health,
            summary="Whether the server can answer; needs no key",
            answer=Health,
            statuses={503: "It cannot, and why"},
        ),
        Operation(
            method="GET",
            path="/version",
            endpoint=health.version,
            summary="What runs here",
            answer=Version,
        ),
        Operation(
            method="GET",
            path="/log/stream",
            endpoint=LogEndpoint(log, config).stream,
            summary="What the models receive and answer, as it happens",
            query={"types": "only these types, with commas between", "token_ids": "1: with token ids"},
        ),
    ]


def _middleware(config: ApiSettings) -> list[Middleware]:
    """From the outermost to the innermost."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, IGNORED_HEADER, "retry-after", "retry-after-ms", "x-should-retry"],
    )
    return [
        Middleware(RequestIdMiddleware),
        *([cors] if config.cors_origins else []),
        Middleware(ErrorMiddleware),
        *([Middleware(ApiKeyMiddleware, keys=config.api_key)] if config.api_key else []),
    ]


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = HTTPException(404, f"Unknown path: {request.method} {request.url.path}", error.headers)
    elif isinstance(error, HTTPException) and error.status_code == 405:
        error = HTTPException(405, f"{request.method} is not allowed here.", error.headers)
    return error_response(error)
