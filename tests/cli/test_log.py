from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import typer
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lmserve.cli.log import format_event, parse_filter
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
def log_server(key: str = "") -> Iterator[str]:
    """A real HTTP server that streams one prediction and ends. Its address."""

    async def events(types: str) -> AsyncGenerator[str, None]:
        yield ": listening\n\n"
        for event in (INPUT, OUTPUT):
            if not types or event["type"] in types.split(","):
                yield f"data: {json.dumps(event)}\n\n"
                yield ": keep-alive\n\n"

    async def stream(request: Request) -> Response:
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "That key\nis wrong."}}, 401)
        return StreamingResponse(events(request.query_params.get("types", "")), media_type="text/event-stream")

    app = Starlette(routes=[Route("/log/stream", stream)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


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
    assert without.stderr == f"lmserve: {url} answers 401: That key is wrong.\n"
    assert by_option.stdout.count("type:") == by_variable.stdout.count("type:") == 2


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
    with pytest.raises(typer.TyperException, match="'input', 'output', or 'input,output'"):
        parse_filter(text)
