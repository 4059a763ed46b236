"""One answer's life on the wire: keep-alive, errors before and after the headers, clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from lmserve.api.generate import clamp_logprob
from lmserve.errors import InsufficientMemory, LMServeError, QueueFull, StepFailed, WorkerDied
from tests.api.running_server import PATIENCE, RunningServer, goes_on, running_server, wait_until
from tests.api.stub_engine import Settings

ASK = {"prompt": "x", "stream": True}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def lively_server() -> Iterator[RunningServer]:
    """One that says it is alive every twentieth of a second."""
    with running_server(Settings(keep_alive_seconds=0.05)) as server:
        yield server


def test_minus_infinity_is_a_number() -> None:
    """JSON has no infinity, and null is no log-probability."""
    assert json.dumps(clamp_logprob(float("-inf"))) == "-9999.0"


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_a_stream(server: RunningServer, path: str, choices: int) -> None:
    server.engine.script, server.engine.pause = goes_on, 0.02
    body = {**CHAT, "n": choices} if "chat" in path else {"prompt": ["a"] * choices, "max_tokens": 400}
    with server.http as http, http.stream("POST", path, json={**body, "stream": True}) as response:
        next(response.iter_bytes())
        server.engine.held = True
    wait_until(lambda: len(server.engine.closed) == len(server.engine.requests) > 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(server: RunningServer, stream: bool) -> None:
    """Without headers or anything else written, only the closed connection says so."""
    server.engine.held = True

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url) as http:
            asking = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "stream": stream}))
            while not server.engine.requests:
                await asyncio.sleep(0.005)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))
    wait_until(lambda: server.engine.closed)


def test_an_error_before_the_first_token_has_its_own_status(server: RunningServer) -> None:
    server.engine.error = QueueFull("The queue is full: 7 wait, the limit is 7.", retry_after=1.5)
    for stream in (False, True):
        response = server.chat(stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "2"
        assert response.headers["retry-after-ms"] == "1500"
        assert "7 wait" in response.json()["error"]["message"]
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="stub", prompt="x", stream=True)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (WorkerDied("The worker ended."), "service_unavailable", "The worker ended."),
        ("out of memory", "server_error", "out of memory"),
    ],
)
def test_an_error_within_a_stream_is_an_event_and_the_end(
    server: RunningServer, error: LMServeError | str, kind: str, message: str
) -> None:
    server.engine.error, server.engine.error_after = error, 2
    response = server.chat(stream=True)
    assert response.status_code == 200
    *_, last = [block for block in response.text.split("\n\n") if block]
    told = json.loads(last.removeprefix("data: "))["error"]
    assert (told["type"], told["message"]) == (kind, message)
    with pytest.raises(openai.APIError, match=message):
        list(server.client.completions.create(model="stub", prompt="x", stream=True))


@pytest.mark.parametrize(("error", "status"), [(WorkerDied("gone"), 503), (StepFailed("lost"), 500), ("lost", 500)])
def test_an_error_within_a_whole_answer(server: RunningServer, error: LMServeError | str, status: int) -> None:
    server.engine.error, server.engine.error_after = error, 2
    assert server.chat().status_code == status


def read_until(chunks: Iterator[str], text: str) -> str:
    """What comes up to and with the text."""
    read = ""
    while text not in read:
        read += next(chunks)
    return read


def test_a_silent_stream_says_that_it_is_alive(lively_server: RunningServer) -> None:
    lively_server.reset()
    lively_server.engine.held = True
    with lively_server.http as http, http.stream("POST", "/v1/completions", json=ASK) as answer:
        chunks = answer.iter_text()
        assert "data:" not in read_until(chunks, ": keep-alive\n\n: keep-alive\n\n")
        lively_server.engine.held = False
        assert read_until(chunks, "data: [DONE]\n\n").count("finish_reason") > 1


def test_a_late_error_is_told_within_the_stream(lively_server: RunningServer) -> None:
    """The headers are gone when it comes."""
    lively_server.reset()
    lively_server.engine.held, lively_server.engine.error = True, WorkerDied("gone")
    with lively_server.http as http, http.stream("POST", "/v1/completions", json=ASK) as answer:
        chunks = answer.iter_text()
        read_until(chunks, ": keep-alive\n\n")
        lively_server.engine.held = False
        rest = "".join(chunks)
    assert answer.status_code == 200
    assert '"message":"gone"' in rest
    assert "[DONE]" not in rest


def test_a_busy_stream_sends_no_comments(server: RunningServer) -> None:
    assert ": keep-alive" not in server.chat(stream=True).text


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, None),
        ({"ttl": 30}, 30.0),
        ({"keep_alive": "5m"}, 300.0),
        ({"keep_alive": 0}, 0.0),
        ({"keep_alive": -1}, float("inf")),
        ({"ttl": 60, "keep_alive": "1m"}, 60.0),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_idle_time_that_is_asked_for(
    server: RunningServer, fields: dict[str, object], seconds: float | None, stream: bool
) -> None:
    server.models.used.clear()
    answer = server.post("/v1/chat/completions", {"model": "stub", **CHAT, **fields, "stream": stream})
    assert answer.status_code == 200
    assert "x-lmserve-ignored" not in answer.headers
    assert server.models.used == [("stub", seconds)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": -5}, "ttl"),
        ({"ttl": "long"}, "ttl"),
        ({"keep_alive": "long"}, "keep_alive"),
        ({"ttl": 1, "keep_alive": 2}, "keep_alive"),
    ],
)
def test_an_idle_time_that_is_none(server: RunningServer, fields: dict[str, object], param: str) -> None:
    answer = server.post("/v1/completions", {"prompt": "x", **fields, "stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_stream_to_a_model_that_loads_says_so_and_an_error_is_an_event_then(lively_server: RunningServer) -> None:
    """Once the headers are out there is no other way."""
    lively_server.models.error, lively_server.models.pause = StepFailed("no memory"), 0.4
    lively_server.entry.state, lively_server.entry.stage = "loading", "loading weights"
    try:
        words = lively_server.post("/v1/completions", ASK).text
        assert ": loading org/stub: loading weights 0%" in words
        assert json.loads(words.rstrip().rpartition("data: ")[2])["error"]["message"] == "no memory"
        assert lively_server.post("/v1/completions", {**ASK, "stream": False}).status_code == 500
    finally:
        lively_server.models.error, lively_server.models.pause = None, 0.0
        lively_server.reset()


def test_a_load_that_fails_soon_has_a_status(server: RunningServer) -> None:
    server.models.error = InsufficientMemory("Model x needs 2 GiB, and 1 GiB are free.")
    try:
        answer = server.post("/v1/completions", ASK)
    finally:
        server.models.error = None
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_memory")
    assert answer.headers["x-should-retry"] == "false"
