"""The log stream: who listens, and what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from lmserve import __version__

LogEvent = dict[str, Any]
"""``timestamp`` (milliseconds), ``type``, and what the type says."""

CAPACITY = 256
CAPACITY_CHARACTERS = 1 << 25
"""Of the texts in the events that a listener has not read: a few prompts can be as long as many."""


DEVICE_USAGE = "device.usage"
ONLY_BY_NAME = frozenset({DEVICE_USAGE})
"""Types that come again and again, whatever happens: a listener who names none does not get them."""


class LogStream:
    """Owns the subscribers. ``publish`` (on the event loop) never waits, and costs nothing when nobody listens.

    ``capacity``: events that a slow subscriber may be behind; older ones are dropped, and it is told how many.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._subscriptions: set[Subscription] = set()

    @property
    def num_subscriptions(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, types: Iterable[str] = (), *, token_ids: bool = False) -> Subscription:
        """Listen to events of these types (none given: all but those of ``ONLY_BY_NAME``) until the subscription is
        closed.

        ``token_ids``: with the token ids of prompts and outputs, which are left out otherwise.
        """
        subscription = Subscription(self, frozenset(types), token_ids, self._capacity)
        self._subscriptions.add(subscription)
        return subscription

    def publish(self, build: Callable[[], LogEvent]) -> None:
        """Tell everyone. ``build`` makes the event, and is called only if there is somebody to tell."""
        if not self._subscriptions:
            return
        event = build()
        for subscription in self._subscriptions:
            subscription.put(event)

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def close(self) -> None:
        """End all subscriptions, so that the server can stop."""
        for subscription in tuple(self._subscriptions):
            subscription.close()


class Subscription:
    """One listener's events, oldest first. An iterator that ends when it is closed; also a context manager."""

    def __init__(self, log: LogStream, types: frozenset[str], token_ids: bool, capacity: int) -> None:
        self._log = log
        self._types = types
        self._token_ids = token_ids
        self._capacity = capacity
        self._events: deque[LogEvent] = deque()
        self._num_characters = 0
        self._num_lost = 0
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, event: LogEvent) -> None:
        """Called by the stream."""
        kind = event["type"]
        if kind not in self._types and (self._types or kind in ONLY_BY_NAME):
            return
        self._num_characters += _num_characters(event)
        while len(self._events) == self._capacity or (self._events and self._num_characters > CAPACITY_CHARACTERS):
            self._num_characters -= _num_characters(self._events.popleft())
            self._num_lost += 1
        self._events.append(event if self._token_ids else _without_token_ids(event))
        self._changed.set()

    def close(self) -> None:
        self._closed = True
        self._log.unsubscribe(self)
        self._changed.set()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[LogEvent]:
        return self

    async def __anext__(self) -> LogEvent:
        while not self._events and not self._closed:
            self._changed = asyncio.Event()
            await self._changed.wait()
        if self._num_lost:
            lost, self._num_lost = self._num_lost, 0
            return lost_events(lost)
        if not self._events:
            raise StopAsyncIteration
        event = self._events.popleft()
        self._num_characters -= _num_characters(event)
        return event


def lost_events(count: int) -> LogEvent:
    """What a listener that was too slow is told."""
    return {**server_event("warning", f"{count} events were dropped because this listener is slow."), "lost": count}


def server_event(level: str, content: str) -> LogEvent:
    """What the server has to say."""
    return {"timestamp": now_ms(), "type": "server.log", "level": level, "content": content}


def runtime_event(model_id: str, engine_type: str, pid: int, level: str, message: str) -> LogEvent:
    """What a model's worker has to say, or what is said of it."""
    return {
        "timestamp": now_ms(),
        "type": "runtime.log",
        "engineName": "lmserve",
        "engineVersion": __version__,
        "engineType": engine_type,
        "modelIdentifier": model_id,
        "pid": pid,
        "level": level,
        "message": message,
    }


def device_event(device: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> LogEvent:
    """How full and busy a device is. ``models``: those that run on it, with what each has of it."""
    return {"timestamp": now_ms(), "type": DEVICE_USAGE, **device, "models": [*models]}


class LogStreamHandler(logging.Handler):
    """Passes what the server logs on to the listeners, from any thread. To be made on the event loop."""

    def __init__(self, log: LogStream) -> None:
        super().__init__()
        self._log = log
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        if self._log.num_subscriptions:
            event = server_event(record.levelname.lower(), record.getMessage())
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._log.publish, lambda: event)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _num_characters(event: LogEvent) -> int:
    texts = (value for value in event.values() if isinstance(value, str))
    return sum(map(len, texts)) + sum(map(len, event.get("inputs", ())))


def _without_token_ids(event: LogEvent) -> LogEvent:
    return {key: value for key, value in event.items() if key != "tokenIds"}
