"""``GET /log/stream``: what the models receive and answer, as it happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

import msgspec
from starlette.requests import Request

from lmserve.api.settings import ApiSettings
from lmserve.api.sse import EventStream, event
from lmserve.errors import InvalidRequest
from lmserve.service.log_stream import DEVICE_USAGE, LogStream, Subscription

TYPES = (
    "llm.prediction.input",
    "llm.prediction.output",
    "embedding.input",
    "embedding.progress",
    "embedding.output",
) + ("server.log", "runtime.log", DEVICE_USAGE)
_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}


class LogEndpoint:
    """Subscribes clients to the log stream."""

    def __init__(self, log: LogStream, settings: ApiSettings) -> None:
        self._log = log
        self._settings = settings

    async def stream(self, request: Request) -> EventStream:
        """``?types=a,b`` only these, else all but device.usage; ``?token_ids=1`` with token ids."""
        types, token_ids = _parse_query(request.query_params)
        return EventStream(self._events(types, token_ids), keep_alive=self._settings.keep_alive_seconds)

    async def _events(self, types: tuple[str, ...], token_ids: bool) -> AsyncGenerator[bytes, None]:
        with self._log.subscribe(types, token_ids=token_ids) as subscription:
            yield b": listening\n\n"  # sends the headers: from now on nothing is missed
            async for chunk in _encoded(subscription):
                yield chunk


async def _encoded(subscription: Subscription) -> AsyncGenerator[bytes, None]:
    encode = msgspec.json.Encoder().encode
    async for entry in subscription:
        yield event(encode(entry))


def _parse_query(query: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
    for name in query:
        if name not in ("types", "token_ids"):
            raise InvalidRequest(f"{name[:64]!r} is no parameter of the log stream; types and token_ids are.", name)
    types = tuple(name for name in query.get("types", "").split(",") if name)
    for name in types:
        if name not in TYPES:
            raise InvalidRequest(f"types: {name[:64]!r} is none of {', '.join(TYPES)}.", "types")
    flag = query.get("token_ids", "").lower()
    if flag not in _FLAGS:
        raise InvalidRequest("token_ids must be 0 or 1.", "token_ids")
    return types, _FLAGS[flag]
