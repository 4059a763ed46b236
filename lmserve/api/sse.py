"""Server-sent events: one writer for everything that streams (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import NoReturn, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from lmserve.api.errors import error_body
from lmserve.errors import LMServeError

logger = logging.getLogger(__name__)

SEND_SECONDS = 600.0
"""How long a client may leave a stream unread: its request keeps its place in the queue meanwhile."""
STATUS_SECONDS = 1.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(data: bytes) -> bytes:
    """One event. ``data`` is JSON, so it has no line break."""
    return b"data: " + data + b"\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled at once when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _cancel(working, gone)


class EventStream:
    """An ASGI response that sends events as they come, each in one write.

    Owns the generator: it is closed as soon as the client is gone or the answer is complete. The headers wait for the
    first event, so that an error before it has its own status; when nothing comes for ``keep_alive`` seconds they are
    sent all the same, and a comment line then and again shows proxies and clients that we are alive. An error after the
    headers is an event, and the end.

    A client that reads slowly keeps ``send`` waiting; no event is fetched meanwhile, and that it is gone is noticed all
    the same. One that takes nothing for ``SEND_SECONDS`` counts as gone.

    ``status``: what keeps the first event waiting, for the comments; empty when there is nothing to say. Once the
    headers are sent a new status is told within ``STATUS_SECONDS``.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive: float,
        headers: Mapping[str, str] | None = None,
        status: Callable[[], str] = str,
    ) -> None:
        self._events = events
        self._keep_alive = keep_alive
        self._headers = headers or {}
        self._status = status
        self._started = False
        self._waiting = True
        self._sending = asyncio.Lock()
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        gone = asyncio.ensure_future(wait_for_disconnect(receive))
        writer = asyncio.ensure_future(self._write(send, gone))
        alive = asyncio.ensure_future(self._keep_saying(send))
        try:
            await asyncio.wait({writer, gone, alive}, return_when=asyncio.FIRST_COMPLETED)
            for task in (writer, alive):
                if task.done():
                    task.result()
        finally:
            await _cancel(writer, gone, alive)

    async def _keep_saying(self, send: Send) -> NoReturn:
        """Comments in long silences. While a send is stuck the client gets what it does not read anyway."""
        clock = asyncio.get_running_loop().time
        said = ""
        while True:
            silence = clock() - self._last_sent
            if silence >= SEND_SECONDS and self._sending.locked():
                raise ClientDisconnect
            status = self._status() if self._waiting else ""
            news = self._started and status != said and status != ""
            if (silence >= self._keep_alive or news) and not self._sending.locked():
                await self._emit(send, f": {status}\n\n".encode() if status else KEEP_ALIVE)
                said, silence = status, 0.0
            pause = self._keep_alive - silence if silence < self._keep_alive else self._keep_alive
            await asyncio.sleep(min(pause, STATUS_SECONDS) if status and self._started else pause)

    async def _write(self, send: Send, gone: asyncio.Future[None]) -> None:
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    self._waiting = False
                    await self._emit(send, chunk)
                    if gone.done():  # a send that was stuck comes back now; what waits behind it is for nobody
                        return
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, LMServeError):
                logger.exception("A stream failed")
            await self._emit(send, event(error_body(error)))
        await self._emit(send, b"", more=False)

    async def _emit(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        async with self._sending:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": self._raw_headers()})
            await send({"type": "http.response.body", "body": chunk, "more_body": more})
            self._last_sent = asyncio.get_running_loop().time()

    def _raw_headers(self) -> list[tuple[bytes, bytes]]:
        headers = MutableHeaders(self._headers)
        headers["content-type"] = "text/event-stream; charset=utf-8"
        headers["cache-control"] = "no-cache"
        headers["x-accel-buffering"] = "no"  # nginx would hold events back
        return headers.raw


async def _cancel(*tasks: asyncio.Future[T] | asyncio.Future[None]) -> None:
    """Cancel, and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
