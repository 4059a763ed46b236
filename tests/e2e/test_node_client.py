"""The official Node client, which scripts/setup.sh installs from tests/e2e/node/package-lock.json."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Server

SCRIPT = Path(__file__).parent / "node/client.mjs"
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def seen(starter_server: Server) -> Any:
    node = Path(sys.executable).parent / "node"
    command = [str(node), str(SCRIPT), f"{starter_server.url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_chat(seen: Any) -> None:
    choice = seen["chat"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
    assert seen["chat"]["usage"]["completion_tokens"] == 8


def test_a_stream(seen: Any) -> None:
    stream = seen["stream"]
    assert (stream["text"], stream["roles"], stream["finish"]) == (ANSWER, ["assistant"], "stop")
    assert stream["usage"]["total_tokens"] == seen["chat"]["usage"]["total_tokens"]
    assert seen["folded"] == ANSWER


def test_a_completion_and_models(seen: Any) -> None:
    assert seen["completion"]["object"] == "text_completion"
    assert seen["completion"]["usage"]["completion_tokens"] == 4
    assert "smollm2-135m-instruct" in seen["models"]
    assert seen["model"] == "model"


def test_errors(seen: Any) -> None:
    invalid = {"kind": "BadRequestError", "status": 400, "type": "invalid_request_error"}
    assert seen["overflow"] == {**invalid, "code": "context_length_exceeded", "param": "messages"}
    assert seen["range"] == {**invalid, "code": None, "param": "temperature"}
    assert seen["embeddings"] == {**invalid, "code": None, "param": "model"}
    assert (seen["missing"]["kind"], seen["missing"]["code"]) == ("NotFoundError", "model_not_found")


def test_embeddings(seen: Any) -> None:
    """By default the client asks for base64 and makes numbers of it; asked for by name it is given as it comes."""
    floats, default, raw = (seen["vectors"][name] for name in ("float", "default", "base64"))
    for each, same, text in zip(floats, default, raw, strict=True):
        assert same["embedding"] == each["embedding"]
        assert list(struct.unpack("<384f", base64.b64decode(text["embedding"]))) == each["embedding"]


def test_a_forced_call(seen: Any) -> None:
    (call,) = seen["call"]["message"]["tool_calls"]
    assert (seen["call"]["finish_reason"], seen["call"]["message"]["content"]) == ("tool_calls", None)
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    first, *others = seen["call_deltas"]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "look_up")
    assert first["id"]
    assert not any({"id", "type"} & delta.keys() or "name" in delta["function"] for delta in others)
    pieces = [delta["function"].get("arguments", "") for delta in seen["call_deltas"]]
    assert "".join(pieces) == call["function"]["arguments"]
    assert seen["call_finish"] == "tool_calls"
    assert seen["call_folded"]["message"]["tool_calls"][0]["function"]["arguments"] == call["function"]["arguments"]


def test_the_helper_runs_the_tool(seen: Any) -> None:
    assert seen["asked"] == [json.loads(seen["call"]["message"]["tool_calls"][0]["function"]["arguments"])["city"]]
    assert seen["agent"] == ["user", "assistant", "tool"]


def test_a_schema(seen: Any) -> None:
    answer = json.loads(seen["formatted"]["message"]["content"])
    assert answer["country"] in ("France", "Italy")
    assert isinstance(answer["sure"], bool)
    assert seen["formatted"]["finish_reason"] == "stop"
    path = "response_format.json_schema.schema.not"
    assert (seen["keyword"]["status"], seen["keyword"]["param"]) == (400, path)


def test_a_stream_that_is_left(seen: Any) -> None:
    assert seen["pieces"] == 3
