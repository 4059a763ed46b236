"""Every limit of the contract's section 7: its default, its flag, its refusal."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from lmserve.config import keys
from tests.api.running_server import RunningServer, goes_on, running_server, wait_until
from tests.api.stub_engine import Settings
from tests.api.test_errors import error_of

DEFAULTS = {
    "max_body_bytes": 32 * 2**20,
    "body_seconds": 120.0,
    "max_json_nesting": 64,
    "max_n": 128,
    "max_choices": 2048,
    "max_stop": 16,
    "max_prompt_tokens": 0,
    "first_token_seconds": 600.0,
    "max_waiting": 1024,
    "max_num_seqs": 64,
}


def refusal(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return error_of(response)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_defaults_and_flags(name: str, default: float) -> None:
    assert keys()[name].default == default
    assert keys()[name].flag == "--" + name.replace("_", "-")


@pytest.fixture(scope="module")
def strict() -> Any:
    """A server with every limit low."""
    settings = Settings(max_json_nesting=8, max_n=2, max_choices=5, max_stop=2, max_prompt_tokens=40)
    with running_server(settings) as server:
        yield server


def test_the_limit_of_n_is_blamed_first(strict: RunningServer) -> None:
    assert refusal(strict.complete(n=5000))["param"] == "n"


def test_more_than_the_engine_holds_is_no_full_queue(server: RunningServer) -> None:
    """It would be refused on an idle server too, so a later try would not help: 8 slots, 1,024 places in the queue."""
    error = refusal(server.complete(prompt=["x"] * 1033, max_tokens=1))
    assert error["param"] == "prompt"
    assert "the limit is 1032" in error["message"]


def test_an_echo_of_too_many_logprobs(server: RunningServer) -> None:
    fields = {"prompt": [5] * 500, "echo": True, "max_tokens": 0, "n": 128}
    error = refusal(server.complete(**fields, logprobs=20))
    assert (error["param"], "1344000 log-prob" in error["message"]) == ("logprobs", True)
    assert server.complete(**fields, logprobs=0).status_code == 200


def test_choices(strict: RunningServer) -> None:
    error = refusal(strict.chat(n=3))
    assert (error["param"], error["message"]) == ("n", "n must be at most 2, got 3.")
    assert strict.chat(n=2).status_code == 200


def test_choices_of_all_prompts(strict: RunningServer) -> None:
    error = refusal(strict.complete(prompt=["x"] * 3, n=2))
    assert error["param"] == "prompt"
    assert "6 choices" in error["message"]
    assert "limit is 5" in error["message"]
    assert strict.complete(prompt=["x"] * 5).status_code == 200


def test_stop_strings(strict: RunningServer) -> None:
    error = refusal(strict.chat(stop=["a", "b", "c"]))
    assert (error["param"], error["message"]) == ("stop", "stop may have at most 2 strings, got 3.")


def test_prompt_tokens(strict: RunningServer) -> None:
    error = refusal(strict.complete(prompt=[5] * 41))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "41 tokens" in error["message"]
    assert "takes 40" in error["message"]
    assert strict.complete(prompt=[5] * 40).status_code == 200
    assert refusal(strict.chat(messages=[{"role": "user", "content": "word " * 50}]))["param"] == "messages"


def test_nesting(strict: RunningServer) -> None:
    assert "8 levels" in refusal(strict.chat(metadata=json.loads("[" * 8 + "]" * 8)))["message"]
    assert strict.chat(metadata=json.loads("[" * 7 + "]" * 7)).status_code == 200


def test_a_key_that_stands_twice(server: RunningServer) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 1, "seed": 2}'
    assert refusal(server.post_bytes(body))["param"] == "seed"


def test_a_million_stop_strings(server: RunningServer) -> None:
    assert refusal(server.chat(stop=["a"] * 100_000))["param"] == "stop"
    body = b'{"messages": [], "stop": [' + b",".join([b'"a"'] * 10**6) + b"]}"
    with running_server(Settings(max_body_bytes=2**25)) as roomy:
        assert refusal(roomy.post_bytes(body))["param"] == "messages"
        assert roomy.chat().status_code == 200


@pytest.mark.parametrize("prompt", ["", [""], [], [[]]])
def test_an_empty_prompt(server: RunningServer, prompt: Any) -> None:
    assert refusal(server.complete(prompt=prompt))["param"] in ("prompt", "prompt[0]")


def test_a_body_that_never_comes() -> None:
    with running_server(Settings(body_seconds=0.2)) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=20) as sock:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            sock.sendall(head + b"content-length: 1000000\r\n\r\n" + b'{"prompt": "')
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        assert json.loads(body)["error"]["code"] == "request_timeout"
        assert server.complete().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_no_first_token_in_time(stream: bool) -> None:
    with running_server(Settings(first_token_seconds=0.2)) as server:
        server.engine.held = True
        response = server.chat(stream=stream)
        error = refusal(response, 503)
        assert (error["type"], error["code"]) == ("service_unavailable", "first_token_timeout")
        assert response.headers["retry-after"] == "5"
        assert "0.2 seconds" in error["message"]
        wait_until(lambda: len(server.engine.closed) == 1)


def test_a_slow_answer_is_no_late_one() -> None:
    """Only the first token has to come in time."""
    with running_server(Settings(first_token_seconds=0.2)) as server:
        server.engine.script, server.engine.pause = goes_on, 0.05
        began = time.monotonic()
        assert server.complete(max_tokens=10).status_code == 200
        assert time.monotonic() - began > 0.3
