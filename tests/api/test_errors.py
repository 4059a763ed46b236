from __future__ import annotations

import inspect
import json
from typing import Any

import openai
import pytest
from starlette.exceptions import HTTPException

from lmserve import errors
from lmserve.api.errors import ERRORS, error_response, kind_of
from tests.api.running_server import RunningServer, running_server
from tests.api.stub_engine import Settings

EXCEPTIONS = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if cls not in (errors.LMServeError, errors.ConfigError) and issubclass(cls, errors.LMServeError)
]


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("cls", EXCEPTIONS)
def test_every_exception_has_its_row(cls: type[Exception]) -> None:
    assert cls in ERRORS


def test_a_new_exception_is_answered_as_its_ancestor() -> None:
    class Novel(errors.Unavailable):
        """Nobody has thought of it yet."""

    assert kind_of(Novel("x")).status == 503
    assert kind_of(KeyError("x")).status == 500


def test_what_is_not_ours_is_not_told() -> None:
    response = error_response(ValueError("/secret/path"))
    assert b"secret" not in bytes(response.body)
    assert response.headers["x-should-retry"] == "false"


def test_who_should_come_again() -> None:
    response = error_response(errors.NotReady("loading", retry_after=0.25))
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "250")
    assert "x-should-retry" not in response.headers
    assert error_response(errors.WorkerDied("x")).headers["retry-after"] == "1"
    assert error_response(errors.ModelLoadFailed("x")).headers["x-should-retry"] == "false"
    assert "retry-after" not in error_response(errors.InvalidRequest("x")).headers


def test_headers_of_the_framework_are_kept() -> None:
    assert error_response(HTTPException(405, "no", {"allow": "POST"})).headers["allow"] == "POST"


def test_the_framework_speaks_our_language(server: RunningServer) -> None:
    missing, wrong_method = server.get("/v1/nothing"), server.get("/v1/chat/completions")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "unknown_url")
    assert "GET /v1/nothing" in error_of(missing)["message"]
    assert (wrong_method.status_code, error_of(wrong_method)["code"]) == (405, "method_not_allowed")
    assert wrong_method.headers["allow"] == "POST"


def test_the_context_is_too_short(server: RunningServer) -> None:
    for stream in (False, True):
        response = server.complete(max_tokens=512, stream=stream)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "512 tokens" in error["message"]
        assert "1 in the prompt" in error["message"]
    assert error_of(server.chat(max_tokens=512))["param"] == "messages"


def test_the_context_is_too_short_for_several_choices(server: RunningServer) -> None:
    error = error_of(server.chat(n=3, stream=True, max_tokens=512))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_a_body_without_a_media_type(server: RunningServer) -> None:
    """A web page may send one anywhere without asking first."""
    with server.http as http:
        response = http.post("/v1/completions", content=b'{"prompt": "x"}')
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


def test_an_unknown_model(server: RunningServer) -> None:
    response = server.chat(model="nobody")
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "org/stub" in error["message"]
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="nobody", prompt="x")


def test_a_model_that_is_not_there_yet(server: RunningServer) -> None:
    server.entry.state = "loading"
    response = server.chat()
    assert response.status_code == 503
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")


def test_a_bug_is_a_500_without_its_trace(server: RunningServer) -> None:
    server.engine.script = lambda request, choice: []
    response = server.chat()
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "IndexError" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"messages": }', b"{} {}", b'{"temperature": NaN}', b'{"temperature": Infinity}', b"\xff"],
)
def test_malformed_json(server: RunningServer, body: bytes) -> None:
    response = server.post_bytes(body)
    assert response.status_code == 400
    assert "not valid JSON" in error_of(response)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"3",
        b"null",
        b'{"temperature": 1e999, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "s\xffa"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "s\xffa": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "user": "s\xffa"}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "s\xed\xa0\x80"}',
        b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b', "messages": []}',
        b'{"messages": [{"role": "user", "content": "x", "extra": ' + b"[" * 500 + b"]" * 500 + b"}]}",
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"1": 1e999}}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 4000 + b"}",
    ],
)
def test_json_that_is_no_request(server: RunningServer, body: bytes) -> None:
    response = server.post_bytes(body)
    assert response.status_code == 400, response.text
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_media_type(server: RunningServer, content_type: str) -> None:
    response = server.post_bytes(b"{}", content_type)
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_another_spelling(server: RunningServer, content_type: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
    assert server.post_bytes(body, content_type).status_code == 200


def test_a_body_that_is_too_large() -> None:
    with running_server(Settings(max_body_bytes=1000)) as server:
        announced = server.post_bytes(b" " * 1001)
        assert (announced.status_code, error_of(announced)["code"]) == (413, "body_too_large")
        with server.http as http:
            chunks = (b" " * 100 for _ in range(11))
            headers = {"content-type": "application/json"}
            counted = http.post("/v1/completions", content=chunks, headers=headers)
        assert counted.status_code == 413
        assert server.complete().status_code == 200


def test_clients_do_not_repeat_what_would_fail_again(server: RunningServer) -> None:
    """The official clients send a 5xx twice more unless they are told not to."""
    server.engine.error = "The model's output is not a number."
    again = server.chat()
    assert (again.status_code, error_of(again)["code"]) == (500, "step_failed")
    assert "x-should-retry" not in again.headers
    server.engine.may_retry = False
    client = server.client.with_options(max_retries=2)
    asked = len(server.engine.requests)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "request_failed"
    assert len(server.engine.requests) == asked + 1
