from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from lmserve.api.log import LogEndpoint
from lmserve.api.middleware import ApiKeyMiddleware
from lmserve.cli.log import WrongFilter, format_event, parse_filter
from lmserve.config import Config
from lmserve.service.log_stream import LogStream
from tests.cli.running import lmserve

INPUT: dict[str, Any] = {
    "timestamp": 1_700_000_000_000,
    "type": "llm.prediction.input",
    "modelIdentifier": "tiny",
    "modelPath": "models/tiny",
    "request_id": "cmpl-1",
    "input": "<|user|>\nGrüße 😀\n",
}
OUTPUT: dict[str, Any] = {
    **INPUT,
    "type": "llm.prediction.output",
    "output": "Hello!",
    "choices": [{"index": 0, "output": "Hello!"}],
    "stats": {"stopReason": "eosFound", "tokensPerSecond": 12.5},
}
del OUTPUT["input"]


@contextmanager
def log_server(key: str = "", *, ends: bool = True) -> Iterator[str]:
    """The real log endpoint on a real server: it tells each listener of one prediction, and hangs up. Its address."""
    log = LogStream()
    keys = [Middleware(ApiKeyMiddleware, keys=[key])] if key else []
    app = Starlette(routes=[Route("/log/stream", LogEndpoint(log, Config()).stream)], middleware=keys)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))

    async def serve(listening: socket.socket) -> None:
        telling = asyncio.create_task(tell_listeners(log, ends))
        await server.serve([listening])
        telling.cancel()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def tell_listeners(log: LogStream, ends: bool) -> None:
    while True:
        while not log.num_subscriptions:
            await asyncio.sleep(0.005)
        log.publish(lambda: INPUT)
        log.publish(lambda: OUTPUT)
        if not ends:
            return
        log.close()


def test_for_people() -> None:
    with log_server() as url:
        done = lmserve("log", "stream", "--url", url, TZ="UTC")
    assert done.stderr == ""
    assert done.stdout == (
        "timestamp: 2023-11-14 22:13:20\ntype: llm.prediction.input\nmodelIdentifier: tiny\nmodelPath: models/tiny\n"
        'input: "<|user|>\nGrüße 😀\n"\n\n'
        "timestamp: 2023-11-14 22:13:20\ntype: llm.prediction.output\nmodelIdentifier: tiny\nmodelPath: models/tiny\n"
        'output: "Hello!"\n\n'
    )


def test_one_json_object_a_line() -> None:
    with log_server() as url:
        bare = lmserve("log", "stream", "--json", "--url", url + "/")
        full = lmserve("log", "stream", "--json", "--stats", "--url", url)
    without_stats = {name: value for name, value in OUTPUT.items() if name != "stats"}
    assert [json.loads(line) for line in bare.stdout.splitlines()] == [INPUT, without_stats]
    assert [json.loads(line) for line in full.stdout.splitlines()] == [INPUT, OUTPUT]


def test_one_direction_with_figures() -> None:
    with log_server() as url:
        done = lmserve("log", "stream", "--filter", "output", "--stats", "--url", url)
    assert "input" not in done.stdout
    assert "stats:\n  stopReason: eosFound\n  tokensPerSecond: 12.5\n" in done.stdout


def test_a_server_that_asks_for_a_key() -> None:
    with log_server(key="secret") as url:
        without = lmserve("log", "stream", "--url", url)
        by_option = lmserve("log", "stream", "--url", url, "--api-key", "secret")
        by_variable = lmserve("log", "stream", "--url", url, LMSERVE_API_KEY="secret,other")
    assert without.returncode == 1
    assert without.stderr == f"lmserve: {url} answers 401: Missing or wrong API key.\n"
    assert by_option.stdout.count("type:") == by_variable.stdout.count("type:") == 2


def heed_interrupts() -> None:
    """As at a terminal: a shell starts what it runs in the background with interrupts ignored, these tests included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_ends_it_quietly() -> None:
    with log_server(ends=False) as url:
        command = [sys.executable, "-m", "lmserve", "log", "stream", "--json", "--url", url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        ) as process:
            try:
                assert process.stdout is not None
                types = [json.loads(process.stdout.readline())["type"] for _ in range(2)]
                assert types == [INPUT["type"], OUTPUT["type"]]
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=30) == ("", "")
            finally:
                process.kill()
    assert process.returncode == 130


def test_several_choices_and_other_events() -> None:
    two = {**OUTPUT, "choices": [{"index": 0, "output": "a"}, {"index": 1, "output": "b"}]}
    del two["stats"]
    assert format_event(two).splitlines()[-2:] == ['output 0: "a"', 'output 1: "b"']
    lost = {"timestamp": 0, "type": "server.log", "level": "warning", "message": "3 events were dropped"}
    assert format_event(lost).splitlines()[1:] == [
        "type: server.log",
        "level: warning",
        "message: 3 events were dropped",
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [("", ()), ("input", ("input",)), ("input,output", ("input", "output")), ("output, input", ("output", "input"))],
)
def test_filters(text: str, parts: tuple[str, ...]) -> None:
    assert parse_filter(text) == parts


@pytest.mark.parametrize("text", ["in", "input,", "input output", ","])
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(WrongFilter, match="'input', 'output', or 'input,output'"):
        parse_filter(text)
