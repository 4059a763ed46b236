"""Exceptions as HTTP answers: the one table of statuses, types and codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lmserve.api.schema.errors import ErrorAnswer, ErrorBody
from lmserve.errors import (
    ContextLengthExceeded,
    DownloadRefused,
    EngineError,
    FirstTokenTimeout,
    HubUnreachable,
    InputTooLong,
    InsufficientMemory,
    InvalidRequest,
    JobNotFound,
    LMServeError,
    ModelLoadFailed,
    ModelNotFound,
    ModelUnloaded,
    NotReady,
    PromptTooLong,
    QueueFull,
    RequestError,
    RequestFailed,
    StepFailed,
    Unavailable,
    UnsupportedField,
    WorkerDied,
)

_INVALID = "invalid_request_error"
_SERVER = "server_error"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one class of exceptions is answered."""

    status: int
    type: str
    code: str | None = None
    repeats: bool = False
    """The same request would fail again. Clients retry a 5xx by themselves unless they are told so."""


ERRORS: dict[type[Exception], ErrorKind] = {
    InvalidRequest: ErrorKind(400, _INVALID),
    UnsupportedField: ErrorKind(400, _INVALID, "unsupported_parameter"),
    ContextLengthExceeded: ErrorKind(400, _INVALID, "context_length_exceeded"),
    PromptTooLong: ErrorKind(400, _INVALID, "context_length_exceeded"),
    InputTooLong: ErrorKind(400, _INVALID, "context_length_exceeded"),
    ModelNotFound: ErrorKind(404, _INVALID, "model_not_found"),
    JobNotFound: ErrorKind(404, _INVALID, "job_not_found"),
    DownloadRefused: ErrorKind(400, _INVALID, "download_refused"),
    RequestError: ErrorKind(400, _INVALID),
    QueueFull: ErrorKind(429, "rate_limit_error", "queue_full"),
    FirstTokenTimeout: ErrorKind(503, "service_unavailable", "first_token_timeout"),
    InsufficientMemory: ErrorKind(503, "service_unavailable", "insufficient_memory", repeats=True),
    ModelUnloaded: ErrorKind(503, "service_unavailable", "model_unloaded", repeats=True),
    HubUnreachable: ErrorKind(503, "service_unavailable", "hub_unreachable"),
    NotReady: ErrorKind(503, "service_unavailable", "not_ready"),
    Unavailable: ErrorKind(503, "service_unavailable"),
    WorkerDied: ErrorKind(503, "service_unavailable", "worker_died"),
    ModelLoadFailed: ErrorKind(500, _SERVER, "model_load_failed", repeats=True),
    StepFailed: ErrorKind(500, _SERVER, "step_failed"),
    RequestFailed: ErrorKind(500, _SERVER, "request_failed", repeats=True),
    EngineError: ErrorKind(500, _SERVER),
    Exception: ErrorKind(500, _SERVER, "internal_error", repeats=True),
}
"""By class; a class that is not here is answered as its nearest ancestor that is."""

HTTP_ERRORS: dict[int, ErrorKind] = {
    401: ErrorKind(401, _INVALID, "invalid_api_key"),
    404: ErrorKind(404, _INVALID, "unknown_url"),
    405: ErrorKind(405, _INVALID, "method_not_allowed"),
    408: ErrorKind(408, _INVALID, "request_timeout"),
    413: ErrorKind(413, _INVALID, "body_too_large"),
    415: ErrorKind(415, _INVALID, "unsupported_media_type"),
}
"""What the framework, or we in its name, refuse before there is a request to speak of: by status."""


def kind_of(error: Exception) -> ErrorKind:
    """The row of the table."""
    if isinstance(error, HTTPException):
        return HTTP_ERRORS.get(error.status_code, ErrorKind(error.status_code, _INVALID))
    return next(ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS)


def error_body(error: Exception) -> bytes:
    """The OpenAI error object. What is not our own exception is not told to the client."""
    kind = kind_of(error)
    message = "Internal server error. The server's log has the details."
    if isinstance(error, HTTPException):
        message = error.detail
    elif isinstance(error, LMServeError):
        message = str(error)
    param = error.param if isinstance(error, RequestError) else None
    return msgspec.json.encode(ErrorAnswer(ErrorBody(message, kind.type, param, kind.code)))


def error_response(error: Exception) -> Response:
    """The answer to a request that failed before its answer began."""
    kind = kind_of(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if kind.status in (429, 503):
        seconds = error.retry_after if isinstance(error, Unavailable) else 1.0
        headers["retry-after"] = str(math.ceil(seconds))
        headers["retry-after-ms"] = str(round(1000 * seconds))
    if kind.status >= 500 and kind.repeats:
        headers["x-should-retry"] = "false"
    return Response(error_body(error), kind.status, headers, media_type="application/json")
