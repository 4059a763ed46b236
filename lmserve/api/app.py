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
from lmserve.api.chat import ChatEndpoint
from lmserve.api.completions import CompletionEndpoint
from lmserve.api.errors import error_response
from lmserve.api.health import HealthEndpoint
from lmserve.api.log import LogEndpoint
from lmserve.api.middleware import REQUEST_ID_HEADER, ApiKeyMiddleware, ErrorMiddleware, RequestIdMiddleware
from lmserve.api.models import ModelsEndpoint
from lmserve.api.settings import ApiSettings
from lmserve.errors import LMServeError
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.protocols import Models


def create_app(service: GenerationService, models: Models, log: LogStream, config: ApiSettings) -> Starlette:
    """The application. It owns nothing: models, threads and the log live as long as their maker wants."""
    chat = ChatEndpoint(service, config)
    completions = CompletionEndpoint(service, config)
    model_list = ModelsEndpoint(models, service)
    health = HealthEndpoint(models)
    routes = [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/models", model_list.list, methods=["GET"]),
        Route("/v1/models/{model_id:path}", model_list.retrieve, methods=["GET"]),
        Route("/health", health.health, methods=["GET"]),
        Route("/version", health.version, methods=["GET"]),
        Route("/log/stream", LogEndpoint(log, config).stream, methods=["GET"]),
    ]
    handlers = {HTTPException: _refuse, LMServeError: _refuse}
    app = Starlette(routes=routes, middleware=_middleware(config), exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


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
