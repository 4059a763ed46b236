from __future__ import annotations

import asyncio
import logging
from functools import partial

import pytest

from lmserve.service import log_stream
from lmserve.service.log_stream import LogEvent, LogStream, LogStreamHandler, Subscription, device_event


def happened(kind: str, **content: object) -> LogEvent:
    return {"timestamp": 1, "type": kind, **content}


async def take(subscription: Subscription, count: int) -> list[LogEvent]:
    return [await asyncio.wait_for(anext(subscription), 5) for _ in range(count)]


def test_nothing_is_built_when_nobody_listens() -> None:
    log = LogStream()
    log.subscribe().close()
    log.publish(lambda: (_ for _ in ()).throw(AssertionError("built")))


def test_everyone_gets_everything_in_order() -> None:
    async def scenario() -> None:
        log = LogStream()
        with log.subscribe() as one, log.subscribe() as two:
            for i in range(3):
                log.publish(partial(happened, "a", i=i))
            assert [event["i"] for event in await take(one, 3)] == [0, 1, 2]
            assert [event["i"] for event in await take(two, 3)] == [0, 1, 2]

    asyncio.run(scenario())


def test_what_comes_again_and_again_comes_to_those_who_name_it() -> None:
    async def scenario() -> None:
        log = LogStream()
        device = {"device": "cpu", "memoryTotalBytes": 7}
        with log.subscribe() as all_others, log.subscribe(["device.usage"]) as by_name:
            log.publish(lambda: device_event(device, [{"modelIdentifier": "tiny"}]))
            log.publish(partial(happened, "a"))
            assert (await take(all_others, 1))[0]["type"] == "a"
            [event] = await take(by_name, 1)
            assert event == {
                "timestamp": event["timestamp"],
                "type": "device.usage",
                **device,
                "models": [{"modelIdentifier": "tiny"}],
            }

    asyncio.run(scenario())


def test_a_waiting_listener_wakes_up() -> None:
    async def scenario() -> None:
        log = LogStream()
        with log.subscribe() as subscription:
            waiting = asyncio.create_task(take(subscription, 1))
            await asyncio.sleep(0)
            log.publish(lambda: happened("a"))
            assert await waiting == [happened("a")]

    asyncio.run(scenario())


def test_a_slow_listener_is_told_how_much_it_lost() -> None:
    async def scenario() -> None:
        log = LogStream(capacity=2)
        with log.subscribe() as subscription:
            for kind in "abcde":
                log.publish(partial(happened, kind))
            lost, *rest = await take(subscription, 3)
            assert lost["lost"] == 3
            assert [event["type"] for event in rest] == ["d", "e"]

    asyncio.run(scenario())


def test_long_texts_that_nobody_reads_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "CAPACITY_CHARACTERS", 1000)

    async def scenario() -> None:
        log = LogStream()
        with log.subscribe() as subscription:
            for i in range(5):
                log.publish(partial(happened, "a", input="x" * 400, i=i))
            lost, *rest = await take(subscription, 3)
            assert lost["lost"] == 3
            assert [event["i"] for event in rest] == [3, 4]
            log.publish(partial(happened, "a", input="x" * 5000, i=5))
            assert [event["i"] for event in await take(subscription, 1)] == [5], "one is always kept"

    asyncio.run(scenario())


def test_what_the_server_logs_reaches_the_listeners_from_any_thread() -> None:
    async def scenario() -> None:
        log = LogStream()
        logger = logging.Logger("lmserve.test")
        logger.addHandler(LogStreamHandler(log))
        logger.warning("nobody listens")
        with log.subscribe(["server.log"]) as subscription:
            await asyncio.to_thread(logger.warning, "model %s", "x")
            [event] = await take(subscription, 1)
            assert (event["type"], event["level"], event["content"]) == ("server.log", "warning", "model x")

    asyncio.run(scenario())


def test_types_and_token_ids() -> None:
    async def scenario() -> None:
        log = LogStream()
        with log.subscribe(["b"]) as short, log.subscribe(["b"], token_ids=True) as long:
            log.publish(lambda: happened("a"))
            log.publish(lambda: happened("b", tokenIds=[1]))
            assert await take(short, 1) == [happened("b")]
            assert await take(long, 1) == [happened("b", tokenIds=[1])]

    asyncio.run(scenario())


def test_closing_the_stream_ends_the_listeners() -> None:
    async def scenario() -> None:
        log = LogStream()
        subscription = log.subscribe()
        listening = asyncio.create_task(_all(subscription))
        await asyncio.sleep(0)
        log.publish(lambda: happened("a"))
        log.close()
        assert await asyncio.wait_for(listening, 5) == [happened("a")]

    asyncio.run(scenario())


async def _all(subscription: Subscription) -> list[LogEvent]:
    return [event async for event in subscription]
