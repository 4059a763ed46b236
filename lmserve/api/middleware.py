"""What happens to every request before its endpoint sees it. Plain ASGI: nothing here reads or holds a body."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmserve.api.errors import error_response
from lmserve.service.log_stream import LogStream, server_event

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
OPEN_PATHS = frozenset({"/health"})

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIdMiddleware:
    """Gives every answer an ``x-request-id``: the client's, if it sent a sane one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["lmserve.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class AccessLogMiddleware:
    """Tells the log stream of every request that has been answered. Free when nobody listens."""

    def __init__(self, app: ASGIApp, log: LogStream) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._log.num_subscriptions:
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), "no answer"

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            seconds, request_id = time.perf_counter() - began, scope["lmserve.request_id"]
            text = f"{scope['method']} {scope['path']} {status} in {seconds:.3f} s ({request_id})"
            self._log.publish(lambda: server_event("info", text))


class ErrorMiddleware:
    """Answers what no one foresaw with a 500 and writes it to the server's log. The client sees no stack trace.

    A client that went away is not an error, and gets no answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except ClientDisconnect:
            return
        except Exception as error:
            if scope["type"] != "http" or started:
                raise
            logger.exception("%s %s failed (%s)", scope["method"], scope["path"], scope.get("lmserve.request_id"))
            await error_response(error)(scope, receive, send)


class ApiKeyMiddleware:
    """Asks for one of the keys, as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``, on all paths but /health."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(Headers(scope=scope)):
            refusal = HTTPException(401, "Missing or wrong API key.", {"www-authenticate": "Bearer"})
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        # All are compared, each in constant time: the answer's time says nothing about the keys.
        matches = [hmac.compare_digest(g.encode("latin-1"), key) for g in given for key in self._keys]
        return any(matches)
