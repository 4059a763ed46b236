from __future__ import annotations

import base64
import struct
from typing import Any

import numpy as np
import openai
import pytest

from lmserve.api.embeddings import INLINE_NUMBERS
from lmserve.errors import ModelUnloaded, WorkerDied
from tests.api.running_server import RunningServer, running_server, wait_until
from tests.api.stub_engine import Settings, StubEngine, runner_info
from tests.api.test_errors import error_of
from tests.api.test_log import listening
from tests.service import tokenizers_for_tests as made

SIZE = 4
LIMIT = 512


@pytest.fixture
def server(server: RunningServer) -> RunningServer:
    """Its model makes vectors of four numbers, which count on from the number of tokens."""
    server.entry.loaded_engine = StubEngine(runner_info(row_size=SIZE), lambda request, choice: [])
    return server


def embed(server: RunningServer, input_: object, path: str = "/v1/embeddings", **fields: object) -> Any:
    response = server.post(path, {"input": input_, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(server: RunningServer, **body: object) -> dict[str, Any]:
    response = server.post("/v1/embeddings", body)
    assert response.status_code == 400, response.text
    assert not server.engine.encoded, "nothing wrong comes to the engine"
    return error_of(response)


def row(num_tokens: int) -> list[float]:
    return [float(num_tokens + i) for i in range(SIZE)]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/v0/embeddings"])
def test_texts_and_token_ids_in_their_order(server: RunningServer, path: str) -> None:
    """The engine gives the last one first."""
    texts = ["Once upon a time", "a", "there was"]
    token_ids = [made.smollm2().encode(text) for text in texts]
    vectors = [row(len(each)) for each in token_ids]
    for inputs in (texts, token_ids):
        answer = embed(server, inputs, path)
        assert [each["index"] for each in answer["data"]] == [0, 1, 2]
        assert [each["embedding"] for each in answer["data"]] == vectors
        assert {each["object"] for each in answer["data"]} == {"embedding"}
        count = sum(map(len, token_ids))
        assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert (answer["object"], answer["model"]) == ("list", "org/stub")
        assert [each.token_ids for each in server.engine.encoded[-1].inputs] == token_ids
    for one in (texts[0], token_ids[0]):
        (only,) = embed(server, one, path)["data"]
        assert only["embedding"] == vectors[0]


def test_the_official_client(server: RunningServer) -> None:
    """It asks for base64 by itself."""
    answer = server.client.embeddings.create(input=["Once upon a time", "a"], model="stub")
    assert [each.embedding for each in answer.data] == [row(4), row(1)]
    assert server.models.tasks[-1] == "embed"


@pytest.mark.parametrize("count", [3, INLINE_NUMBERS // SIZE + 1])
def test_base64_and_numbers_are_the_same_bits(server: RunningServer, count: int) -> None:
    ids = [[1] * (1 + i % 7) for i in range(min(count, 2048))]
    floats, strings = (embed(server, ids, encoding_format=name, dimensions=3)["data"] for name in ("float", "base64"))
    for number, string in zip(floats, strings, strict=True):
        assert struct.pack("<3f", *number["embedding"]) == base64.b64decode(string["embedding"])


def test_dimensions_cut_and_scale(server: RunningServer) -> None:
    (only,) = embed(server, [1, 2, 3], dimensions=2)["data"]
    assert np.allclose(only["embedding"], np.array([3, 4]) / 5, rtol=0, atol=1e-7)
    (only,) = embed(server, [1, 2, 3], dimensions=4.0)["data"]
    assert np.isclose(np.linalg.norm(only["embedding"]), 1)


@pytest.mark.parametrize("dimensions", [0, -1, 5, 2.5])
def test_dimensions_that_the_model_has_not(server: RunningServer, dimensions: float) -> None:
    assert refused(server, input="a", dimensions=dimensions)["param"] == "dimensions"


@pytest.mark.parametrize(
    ("inputs", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([[]], "input"),
        (["a", ""], "input[1]"),
        ([[1], []], "input[1]"),
        (["a", [1]], "input[1]"),
        ([1, "a"], "input[1]"),
        ([[1, 49152]], "input"),
        ([[1], [-1]], "input[1]"),
        ([1] * (LIMIT + 1), "input"),
        (["a", "word " * (LIMIT + 1)], "input[1]"),
        (["a"] * 2049, "input"),
        (3, "input"),
        (None, "input"),
    ],
)
def test_inputs_that_cannot_be(server: RunningServer, inputs: object, param: str) -> None:
    assert refused(server, input=inputs)["param"] == param


def test_too_long_is_refused_with_the_numbers(server: RunningServer) -> None:
    error = refused(server, input=[[1], [1] * 700])
    assert error["code"] == "context_length_exceeded"
    assert all(word in error["message"] for word in ("input[1]", "700", "512"))
    assert len(embed(server, [1] * LIMIT)["data"]) == 1


def test_too_long_is_cut_where_that_is_asked_for(server: RunningServer) -> None:
    for cut_to, length in ((-1, LIMIT), (10, 10), (10_000, LIMIT)):
        answer = embed(server, [list(range(700)), [5, 6]], truncate_prompt_tokens=cut_to)
        assert [each.token_ids for each in server.engine.encoded[-1].inputs] == [[*range(length)], [5, 6]]
        assert answer["usage"]["total_tokens"] == length + 2
    server.engine.encoded.clear()
    for wrong in (0, -2, 1.5):
        assert refused(server, input="a", truncate_prompt_tokens=wrong)["param"] == "truncate_prompt_tokens"


def test_prompts_by_name(server: RunningServer) -> None:
    """SmolLM2 has none; those of models that have some are in the tests of the service."""
    assert refused(server, input="a", prompt_name="query")["param"] == "prompt_name"
    assert refused(server, input=[[1]], prompt_name="query")["param"] == "prompt_name"


def test_unknown_and_unused_fields_are_reported(server: RunningServer) -> None:
    response = server.post("/v1/embeddings", {"input": "a", "user": "me", "color": 1})
    assert response.headers["x-lmserve-ignored"] == "user, color"


def test_the_idle_time_is_passed_on(server: RunningServer) -> None:
    embed(server, "a", model="stub", ttl=5)
    assert server.models.used[-1] == ("stub", 5.0)
    server.engine.encoded.clear()
    assert refused(server, input="a", ttl=0)["param"] == "ttl"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ("The step failed.", 500, "step_failed"),
        (WorkerDied("It ended."), 503, "worker_died"),
        (ModelUnloaded("Gone."), 503, "model_unloaded"),
    ],
)
def test_what_the_engine_cannot_do(server: RunningServer, error: Any, status: int, code: str) -> None:
    server.engine.error = error
    response = server.post("/v1/embeddings", {"input": ["a", "b"]})
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_a_vector_that_is_not_a_number_is_an_error(server: RunningServer) -> None:
    """JSON has no word for it."""
    server.entry.loaded_engine = StubEngine(runner_info(row_size=1), lambda request, choice: [])
    server.engine.row = float("nan")
    response = server.post("/v1/embeddings", {"input": "a"})
    assert (response.status_code, error_of(response)["code"]) == (500, "request_failed")
    assert response.headers["x-should-retry"] == "false"


def test_a_client_that_goes_away_ends_the_work(server: RunningServer) -> None:
    server.engine.pause = 0.05
    client = server.client.with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        client.embeddings.create(input=["a"] * 500, model="stub")
    wait_until(lambda: server.engine.closed == [server.engine.encoded[0].request_id])


def test_a_request_that_waits_too_long_is_given_up() -> None:
    with running_server(Settings(first_token_seconds=0.3)) as server:
        server.engine.pause = 30.0
        response = server.post("/v1/embeddings", {"input": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "first_token_timeout")
        assert response.headers["retry-after"] == "5"
        assert len(server.engine.closed) == 1


def test_the_log_stream_shows_what_goes_in_and_how_far_it_is(server: RunningServer) -> None:
    server.engine.pause = 0.3
    with listening(server) as events:
        embed(server, ["Once upon", "a", "b", "c", "d", "e"])
        types = []
        while "embedding.output" not in types:
            event = next(events)
            types.append(event["type"])
            if event["type"] == "embedding.input":
                assert event["inputs"] == ["Once upon", "a", "b", "c", "d", "e"]
                assert (event["inputsCount"], event["promptTokensCount"]) == (6, 7)
            if event["type"] == "embedding.progress":
                assert 0 < event["inputsDone"] < 6
    assert types[0] == "embedding.input"
    assert "embedding.progress" in types
    assert (event["status"], event["inputsDone"], event["promptTokensCount"]) == ("finished", 6, 7)
