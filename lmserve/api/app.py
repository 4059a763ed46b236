"""The HTTP application: routes, middleware, and what becomes of exceptions."""

from __future__ import annotations

from collections.abc import Sequence

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
from lmserve.api.middleware import (
    REQUEST_ID_HEADER,
    AccessLogMiddleware,
    ApiKeyMiddleware,
    ErrorMiddleware,
    RequestIdMiddleware,
)
from lmserve.api.models import ModelsEndpoint
from lmserve.api.openapi import OpenApiEndpoint, Operation
from lmserve.api.schema.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from lmserve.api.schema.completions import Completion, CompletionRequest
from lmserve.api.schema.embeddings import EmbeddingList, EmbeddingRequest
from lmserve.api.schema.models import Health, ModelDetails, ModelDetailsList, ModelItem, ModelList, Version
from lmserve.api.schema.scores import RerankAnswer, RerankRequest, ScoreAnswer, ScoreRequest
from lmserve.api.schema.tokens import (
    ApplyTemplateAnswer,
    ApplyTemplateRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from lmserve.api.scores import ScoresEndpoint
from lmserve.api.settings import ApiSettings
from lmserve.api.tokens import TokensEndpoint
from lmserve.errors import LMServeError
from lmserve.service.encoding import EncodingService
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.protocols import Models


def create_app(
    service: GenerationService,
    encoding: EncodingService,
    models: Models,
    log: LogStream,
    config: ApiSettings,
    more: Sequence[Operation] = (),
) -> Starlette:
    """The application, with ``more`` operations than those it has always.

    It owns nothing: models, threads and the log live as long as their maker wants.
    """
    operations = [*_operations(service, encoding, models, log, config), *more]
    document = OpenApiEndpoint(operations, with_keys=bool(config.api_key)).document
    routes = [Route(o.path, o.endpoint, methods=[o.method]) for o in operations]
    routes.append(Route("/openapi.json", document, methods=["GET"]))
    handlers = {HTTPException: _refuse, LMServeError: _refuse}
    app = Starlette(routes=routes, middleware=_middleware(config, log), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _operations(
    service: GenerationService, encoding: EncodingService, models: Models, log: LogStream, config: ApiSettings
) -> list[Operation]:
    """Every path: what is routed is what is documented."""
    return [
        *_generating(service, config, "/v1", with_stats=False),
        *_generating(service, config, "/api/v0", with_stats=True),
        *_encoding(encoding, config),
        *_about_tokens(service, config),
        *_about_the_server(models, log, config),
    ]


def _generating(service: GenerationService, config: ApiSettings, base: str, *, with_stats: bool) -> list[Operation]:
    chat = GenerationEndpoint(service, config, CHAT, with_stats=with_stats).create
    completion = GenerationEndpoint(service, config, COMPLETION, with_stats=with_stats).create
    note = ", with statistics as in LM Studio's REST API" if with_stats else ""
    return [
        Operation(
            "POST",
            f"{base}/chat/completions",
            chat,
            f"Answer a chat{note}",
            body=ChatCompletionRequest,
            answer=ChatCompletion,
            chunk=ChatCompletionChunk,
        ),
        Operation(
            "POST",
            f"{base}/completions",
            completion,
            f"Continue a text{note}",
            body=CompletionRequest,
            answer=Completion,
            chunk=Completion,
        ),
    ]


def _encoding(service: EncodingService, config: ApiSettings) -> list[Operation]:
    embed, scores = EmbeddingsEndpoint(service, config).create, ScoresEndpoint(service, config)
    vectors, order = "Vectors of texts", "Put documents in the order in which they suit a query"
    return [
        *(
            Operation("POST", path, embed, vectors, body=EmbeddingRequest, answer=EmbeddingList)
            for path in ("/v1/embeddings", "/api/v0/embeddings")
        ),
        *(
            Operation("POST", path, scores.rerank, order, body=RerankRequest, answer=RerankAnswer)
            for path in ("/v1/rerank", "/rerank")
        ),
        *(
            Operation("POST", path, scores.score, "Score pairs of texts", body=ScoreRequest, answer=ScoreAnswer)
            for path in ("/v1/score", "/score")
        ),
    ]


def _about_tokens(service: GenerationService, config: ApiSettings) -> list[Operation]:
    tokens = TokensEndpoint(service, config)
    return [
        Operation(
            "POST",
            "/tokenize",
            tokens.tokenize,
            "The tokens of a text or of a chat",
            body=TokenizeRequest,
            answer=TokenizeAnswer,
        ),
        Operation(
            "POST",
            "/detokenize",
            tokens.detokenize,
            "The text of tokens",
            body=DetokenizeRequest,
            answer=DetokenizeAnswer,
        ),
        Operation(
            "POST",
            "/apply-template",
            tokens.apply_template,
            "What the model receives of a chat",
            body=ApplyTemplateRequest,
            answer=ApplyTemplateAnswer,
        ),
    ]


def _about_the_server(models: Models, log: LogStream, config: ApiSettings) -> list[Operation]:
    model_list, health = ModelsEndpoint(models), HealthEndpoint(models)
    cannot = {503: "It cannot, and why"}
    types = "only these types, with commas between; none: all but device.usage"
    query = {"types": types, "token_ids": "1: with token ids"}
    stream = LogEndpoint(log, config).stream
    return [
        Operation("GET", "/v1/models", model_list.list, "The models that can be asked", answer=ModelList),
        Operation("GET", "/v1/models/{model_id:path}", model_list.retrieve, "One model, by its id", answer=ModelItem),
        Operation(
            "GET", "/api/v0/models", model_list.details, "All models, as LM Studio lists them", answer=ModelDetailsList
        ),
        Operation(
            "GET", "/api/v0/models/{model_id:path}", model_list.detail, "One of them, by its id", answer=ModelDetails
        ),
        Operation(
            "GET", "/health", health.health, "Whether the server can answer; no key", answer=Health, statuses=cannot
        ),
        Operation("GET", "/version", health.version, "What runs here", answer=Version),
        Operation("GET", "/log/stream", stream, "What the models receive and answer, as it happens", query=query),
    ]


def _middleware(config: ApiSettings, log: LogStream) -> list[Middleware]:
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
        Middleware(AccessLogMiddleware, log=log),
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
