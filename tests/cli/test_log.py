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
from lmserve.cli.log import Source, WrongFilter, event_types, format_event
from lmserve.config import Config
from lmserve.service.log_stream import LogStream, lost_events
from tests.cli.running import lmserve
from tests.cli.scripted_server import Refusal, Script, scripted_server
from tests.cli.terminal_program import at_terminal

INPUT: dict[str, Any] = {
    "timestamp": 1_700_000_000_000,
    "type": "llm.prediction.input",
    "modelIdentifier": "tiny",
    "modelPath": "models/tiny",
    "request_id": "cmpl-1",
    "input": "<|user|>\nGrüße 😀\u2028\x85\n",
    "promptTokensCount": 7,
    "parameters": {"seed": 5, "top_p": None, "min_p": 0, "logit_bias": {}, "stop": ["a b"]},
}
OUTPUT: dict[str, Any] = {
    **INPUT,
    "type": "llm.prediction.output",
    "output": "Hello!",
    "choices": [{"index": 0, "output": "Hello!"}],
    "stats": {"stopReason": "eosFound", "tokensPerSecond": 12.5},
}
for _name in ("input", "promptTokensCount", "parameters"):
    del OUTPUT[_name]


@contextmanager
def log_server(key: str = "", *, ends: bool = True, token_ids: list[int] | None = None) -> Iterator[str]:
    """The real log endpoint on a real server: it tells each listener of one prediction, and hangs up. Its address."""
    told = {**INPUT, "tokenIds": token_ids} if token_ids else INPUT
    log = LogStream()
    keys = [Middleware(ApiKeyMiddleware, keys=[key])] if key else []
    app = Starlette(routes=[Route("/log/stream", LogEndpoint(log, Config()).stream)], middleware=keys)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))

    async def serve(listening: socket.socket) -> None:
        telling = asyncio.create_task(tell_listeners(log, told, ends))
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


async def tell_listeners(log: LogStream, told: dict[str, Any], ends: bool) -> None:
    while True:
        while not log.num_subscriptions:
            await asyncio.sleep(0.005)
        log.publish(lambda: told)
        log.publish(lambda: OUTPUT)
        if not ends:
            return
        log.close()


def test_for_people() -> None:
    with log_server() as url:
        done = lmserve("log", "stream", "--url", url, TZ="UTC")
    assert done.stderr == f"Streaming logs from {url}\nThe server closed the stream.\n"
    assert done.stdout == (
        "timestamp: 2023-11-14 22:13:20\ntype: llm.prediction.input\nmodelIdentifier: tiny\nmodelPath: models/tiny\n"
        'request_id: cmpl-1\npromptTokensCount: 7\nparameters: seed=5 min_p=0 stop=["a b"]\n'
        "input:\n<|user|>\nGrüße 😀\u2028\x85\n\n\n\n"
        "timestamp: 2023-11-14 22:13:20\ntype: llm.prediction.output\nmodelIdentifier: tiny\nmodelPath: models/tiny\n"
        "request_id: cmpl-1\noutput:\nHello!\n\n\n"
    )


def test_one_json_object_a_line() -> None:
    with log_server() as url:
        bare = lmserve("log", "stream", "--json", "--url", url + "/")
        full = lmserve("log", "stream", "--json", "--stats", "--url", url)
    without_stats = {name: value for name, value in OUTPUT.items() if name != "stats"}
    assert [json.loads(line) for line in bare.stdout.split("\n") if line] == [INPUT, without_stats]
    assert [json.loads(line) for line in full.stdout.split("\n") if line] == [INPUT, OUTPUT]
    assert bare.stderr == f"Streaming logs from {url}\n"


def test_one_direction_with_figures() -> None:
    with log_server() as url:
        done = lmserve("log", "stream", "--filter", "output", "--stats", "--url", url)
        only_input = lmserve("log", "stream", "--filter", " input ", "--json", "--url", url)
    assert "input" not in done.stdout
    assert done.stdout.endswith("output:\nHello!\nstopReason: eosFound\ntokensPerSecond: 12.5\n\n\n")
    assert [json.loads(line)["type"] for line in only_input.stdout.split("\n") if line] == [INPUT["type"]]


def test_token_ids_on_demand() -> None:
    with log_server(token_ids=[1, 2]) as url:
        without = lmserve("log", "stream", "--filter", "input", "--url", url)
        with_ids = lmserve("log", "stream", "--filter", "input", "--token-ids", "--url", url)
    assert "tokenIds" not in without.stdout
    assert "tokenIds: [1, 2]\n" in with_ids.stdout


def test_a_server_that_asks_for_a_key() -> None:
    with log_server(key="secret") as url:
        without = lmserve("log", "stream", "--url", url)
        by_option = lmserve("log", "stream", "--url", url, "--api-key", "secret")
        by_variable = lmserve("log", "stream", "--url", url, LMSERVE_API_KEY="secret,other")
    assert without.returncode == 1
    assert without.stderr == "lmserve: Missing or wrong API key. Give one with --api-key or LMSERVE_API_KEY.\n"
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
                assert process.communicate(timeout=30) == ("", f"Streaming logs from {url}\n")
            finally:
                process.kill()
    assert process.returncode == 130


def test_several_choices_and_no_figures() -> None:
    choices = [
        {"index": 0, "output": "a", "stopReason": "eosFound"},
        {"index": 1, "output": "b\nc", "stopReason": "stopStringFound"},
    ]
    two = {**OUTPUT, "choices": choices}
    assert "\n".join(format_event(two, stats=True)).endswith(
        "output 0:\na\noutput 1:\nb\nc\n"
        "stopReason 0: eosFound\nstopReason 1: stopStringFound\ntokensPerSecond: 12.5\n\n"
    )
    del two["stats"]
    assert list(format_event(two, stats=True))[-2:] == ["No stats available", "\n"]
    assert list(format_event(two))[-2:] == ["output 1:\nb\nc", "\n"]


def test_what_the_server_and_the_runtime_say() -> None:
    runtime = {
        "timestamp": 0,
        "type": "runtime.log",
        "engineName": "lmserve",
        "engineVersion": "1.2",
        "engineType": "transformers",
        "modelIdentifier": "tiny",
        "pid": 77,
        "level": "warning",
        "message": "memory is short",
    }
    bare = {"timestamp": 0, "type": "runtime.log", "engineName": "lmserve", "level": "info", "message": "hello"}
    said = {"timestamp": 0, "type": "server.log", "level": "info", "content": "a line"}
    script = Script(log_events=[runtime, bare, said])
    with scripted_server(script) as url:
        from_server = lmserve("log", "stream", "-s", "server", "--url", url)
        from_runtime = lmserve("log", "stream", "--source", "runtime", "--json", "--url", url)
    assert from_server.stdout == (
        "[WARNING] lmserve@1.2 (transformers) tiny pid=77 memory is short\n[INFO] lmserve hello\na line\n"
    )
    assert [json.loads(line) for line in from_runtime.stdout.splitlines()] == script.log_events
    assert [path for _, path, _ in script.asked] == ["/log/stream?types=server.log", "/log/stream?types=runtime.log"]


def test_how_busy_the_devices_are() -> None:
    usage = {
        "timestamp": 0,
        "type": "device.usage",
        "device": "cpu",
        "memoryTotalBytes": 16 * 2**30,
        "memoryUsedBytes": 9 * 2**30,
        "utilizationPercent": 75.5,
        "models": [
            {"modelIdentifier": "tiny", "memoryBytes": 2**30, "cpuPercent": 41.2},
            {"modelIdentifier": "other", "memoryBytes": 2**29, "cpuPercent": None},
        ],
    }
    gpu = {**usage, "device": "cuda:0", "memoryUsedBytes": None, "utilizationPercent": None, "models": []}
    script = Script(log_events=[usage, gpu])
    with scripted_server(script) as url:
        done = lmserve("log", "stream", "--source", "device", "--url", url, TZ="UTC")
        as_json = lmserve("log", "stream", "--source", "device", "--json", "--url", url)
    assert done.stdout == (
        "00:00:00 cpu 76% busy, 9.00 GiB of 16.0 GiB used; tiny 1.00 GiB 41% CPU; other 512.0 MiB\n"
        "00:00:00 cuda:0 16.0 GiB of memory\n"
    )
    assert [json.loads(line) for line in as_json.stdout.splitlines()] == script.log_events
    assert {path for _, path, _ in script.asked} == {"/log/stream?types=device.usage"}


def test_a_listener_that_lost_events_is_told() -> None:
    with scripted_server(Script(log_events=[INPUT, lost_events(3)])) as url:
        done = lmserve("log", "stream", "--url", url)
    assert done.stdout.endswith("\n\n\n3 events were dropped because this listener is slow.\n")


def test_texts_do_not_drive_the_terminal() -> None:
    event = {**INPUT, "input": "a\x1b[2J\nb\tc"}
    with scripted_server(Script(log_events=[event])) as url:
        with at_terminal("log", "stream", "--url", url) as program:
            assert program.end() == 0
        piped = lmserve("log", "stream", "--url", url)
    assert "input:\na\\x1b[2J\nb\tc\n" in program.text
    assert "input:\na\x1b[2J\nb\tc\n" in piped.stdout


def test_a_stream_that_breaks_is_a_failure() -> None:
    with scripted_server(Script(log_events=[INPUT, json.loads(Refusal(0, "The log is lost.").body())])) as url:
        done = lmserve("log", "stream", "--json", "--url", url)
    assert (done.returncode, done.stderr) == (1, f"Streaming logs from {url}\nlmserve: The log is lost.\n")
    assert json.loads(done.stdout) == INPUT


@pytest.mark.parametrize(
    ("source", "text", "types"),
    [
        (
            Source.MODEL,
            None,
            ("llm.prediction.input", "llm.prediction.output", "embedding.input", "embedding.output")
            + ("embedding.progress",),
        ),
        (Source.MODEL, "input", ("llm.prediction.input", "embedding.input")),
        (
            Source.MODEL,
            "output, input",
            ("llm.prediction.output", "llm.prediction.input", "embedding.output", "embedding.input")
            + ("embedding.progress",),
        ),
        (Source.SERVER, None, ("server.log",)),
        (Source.RUNTIME, None, ("runtime.log",)),
        (Source.DEVICE, None, ("device.usage",)),
    ],
)
def test_filters(source: Source, text: str | None, types: tuple[str, ...]) -> None:
    assert event_types(source, text) == types


def test_embeddings_for_people() -> None:
    event = {"timestamp": 0, "type": "embedding.input", "modelIdentifier": "m", "request_id": "r", "inputsCount": 2}
    lines = [*format_event({**event, "inputs": ["one", "two\nlines"]})]
    assert lines[1:-1] == [
        "type: embedding.input",
        "modelIdentifier: m",
        "request_id: r",
        "inputsCount: 2",
        "input 0:\none",
        "input 1:\ntwo\nlines",
    ]
    assert [*format_event({**event, "inputs": ["one"]})][-2] == "input:\none"
    out = [*format_event({**event, "type": "embedding.output", "seconds": 0.5, "status": "finished"})]
    assert out[1:-1] == [
        "type: embedding.output",
        "modelIdentifier: m",
        "request_id: r",
        "inputsCount: 2",
        "seconds: 0.5",
        "status: finished",
    ]


@pytest.mark.parametrize("text", ["in", "input,", "input output", ","])
def test_filters_that_are_none(text: str) -> None:
    with pytest.raises(WrongFilter, match="'input', 'output', or 'input,output'"):
        event_types(Source.MODEL, text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--filter", ""], "--filter cannot be empty"),
        (["--stats", "--source", "server"], "--stats can only be used with --source model"),
        (["--filter", "input", "--source", "server"], "--filter can only be used with --source model"),
        (["--token-ids", "--source", "runtime"], "--token-ids can only be used with --source model"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], says: str) -> None:
    done = lmserve("log", "stream", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"lmserve: {says}\n")
