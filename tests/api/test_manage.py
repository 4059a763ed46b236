"""LM Studio's REST API v1 about models, with a real manager and real workers behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmserve.api.manage import MAX_PARALLEL
from tests.api.running_server import RunningServer, running_server

LOAD, UNLOAD = "/api/v1/models/load", "/api/v1/models/unload"
SMALL = {"context_length": 100, "parallel": 2, "eval_batch_size": 64}


@pytest.fixture(scope="module")
def tiny_server(tiny_folder: Path) -> Iterator[RunningServer]:
    with running_server(aliases=(("org/tiny", str(tiny_folder)),)) as server:
        yield server


def model(server: RunningServer, key: str) -> dict[str, Any]:
    models = {model["key"]: model for model in server.get("/api/v1/models").json()["models"]}
    found: dict[str, Any] = models[key]
    return found


def refusal(server: RunningServer, path: str, body: object) -> tuple[int, str | None, str]:
    answer = server.post(path, body)
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def test_a_model_is_listed_loaded_and_unloaded_in_lm_studios_shapes(tiny_server: RunningServer) -> None:
    known = model(tiny_server, "org/tiny")
    assert (known["type"], known["publisher"], known["display_name"], known["source"]) == (
        "llm",
        "org",
        "tiny",
        "alias",
    )
    assert (known["architecture"], known["format"], known["quantization"]["name"]) == ("llama", "safetensors", "F32")
    assert (known["max_context_length"], known["loaded_instances"]) == (4096, [])
    assert known["size_bytes"] > 10_000
    assert known["params_string"].endswith("K")

    answer = tiny_server.post(LOAD, {"model": "tiny", **SMALL, "echo_load_config": True, "flash_attention": True})
    assert answer.headers["x-lmserve-ignored"] == "flash_attention"
    body = answer.json()
    assert (body["type"], body["instance_id"], body["status"]) == ("llm", "org/tiny", "loaded")
    assert body["load_time_seconds"] > 0
    config = body["load_config"]
    assert {key: config[key] for key in SMALL} == SMALL

    [instance] = model(tiny_server, "org/tiny")["loaded_instances"]
    assert (instance["id"], instance["state"], instance["status"]) == ("org/tiny", "loaded", "idle")
    assert (instance["just_in_time"], instance["ttl_seconds"], instance["ttl_left_seconds"]) == (False, None, None)
    assert instance["config"] == config
    assert instance["memory_bytes"] > 10**7
    assert instance["device_memory_bytes"] > 10**7
    device = instance["device"]
    assert device["name"] == "cpu"
    assert instance["device_memory_bytes"] < device["memory_used_bytes"] < device["memory_total_bytes"]
    assert 0 <= instance["cpu_percent"] <= 100
    assert 0 <= device["utilization_percent"] <= 100
    assert instance["estimated_bytes"] > 10**7
    again = tiny_server.post(LOAD, {"model": "org/tiny", "ttl": 500}).json()
    assert "load_config" not in again
    assert model(tiny_server, "org/tiny")["loaded_instances"][0]["ttl_left_seconds"] <= 500
    assert refusal(tiny_server, LOAD, {"model": "tiny", "context_length": 50})[:2] == (400, "model")

    freed = tiny_server.post(UNLOAD, {"instance_id": "org/tiny"}).json()
    assert freed["instance_id"] == "org/tiny"
    assert freed["freed_bytes"] > 10**7
    assert model(tiny_server, "org/tiny")["loaded_instances"] == []
    assert refusal(tiny_server, UNLOAD, {"instance_id": "org/tiny"})[:2] == (404, "instance_id")


def test_a_load_can_be_followed(tiny_server: RunningServer) -> None:
    answer = tiny_server.post(LOAD, {"model": "tiny", "identifier": "desk", "stream": True, **SMALL})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert {event["instance_id"] for event in events} == {"desk"}
    assert [event["type"] for event in events[:-1]] == ["model_load.progress"] * (len(events) - 1)
    progress = [event.get("progress", 0.0) for event in events]
    assert progress == sorted(progress)
    end = events[-1]
    assert (end["type"], end["progress"], end["result"]["instance_id"]) == ("model_load.end", 1.0, "desk")
    assert [instance["id"] for instance in model(tiny_server, "org/tiny")["loaded_instances"]] == ["desk"]
    assert tiny_server.post(UNLOAD, {"instance_id": "desk"}).status_code == 200


def test_a_load_that_fails_while_it_is_followed(tiny_server: RunningServer) -> None:
    answer = tiny_server.post(LOAD, {"model": "tiny", "stream": True, "context_length": 2**31 - 1, "parallel": 1})
    words = answer.text
    assert "insufficient_memory" in words
    assert "weights" in words


def test_an_estimate_loads_nothing(tiny_server: RunningServer) -> None:
    body = tiny_server.post(LOAD, {"model": "tiny", "estimate_only": True, **SMALL}).json()
    terms = ("weights_bytes", "kv_cache_bytes", "activations_bytes", "fixed_bytes")
    assert body["total_bytes"] == sum(body[term] for term in terms)
    assert all(body[term] > 0 for term in terms)
    assert (body["fits"], body["would_unload"], body["context_length"], body["parallel"]) == (True, [], 100, 2)
    assert "it fits" in body["message"]
    huge = tiny_server.post(LOAD, {"model": "tiny", "estimate_only": True, "context_length": 2**31 - 1}).json()
    assert not huge["fits"]
    assert huge["total_bytes"] > huge["free_bytes"]
    assert "does not fit" in huge["message"]
    assert model(tiny_server, "org/tiny")["loaded_instances"] == []


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({}, 400, "model", "required"),
        ({"model": "nobody"}, 404, "model", "org/tiny"),
        ({"model": "../../etc"}, 404, "model", "not known"),
        ({"model": "/"}, 404, "model", "not known"),
        ({"model": "tiny", "ttl": 0}, 400, "ttl", "above 0"),
        ({"model": "tiny", "ttl": "soon"}, 400, "ttl", "number"),
        ({"model": "tiny", "context_length": 0}, 400, "context_length", "[1, "),
        ({"model": "tiny", "context_length": 1.5}, 400, "context_length", "integer"),
        ({"model": "tiny", "parallel": MAX_PARALLEL + 1}, 400, "parallel", str(MAX_PARALLEL)),
        ({"model": "tiny", "identifier": "a b"}, 400, "identifier", "characters"),
        ({"model": "tiny", "identifier": ""}, 400, "identifier", "characters"),
        ({"model": "tiny", "identifier": "all-minilm-l6-v2"}, 400, "identifier", "another model"),
        ({"model": "tiny", "num_experts": 2}, 400, "num_experts", "experts"),
    ],
)
def test_refusals_name_the_field(
    tiny_server: RunningServer, body: dict[str, object], status: int, param: str, says: str
) -> None:
    assert refusal(tiny_server, LOAD, body)[:2] == (status, param)
    assert says in refusal(tiny_server, LOAD, body)[2]


def test_a_model_is_never_loaded_from_a_path_that_a_client_gives(tiny_server: RunningServer, tiny_folder: Path) -> None:
    """Its own location is another name for a known model; any other path is none."""
    assert refusal(tiny_server, LOAD, {"model": str(tiny_folder.parent)})[0] == 404
    assert refusal(tiny_server, LOAD, {"model": "Qwen/Qwen3-0.6B"})[0] == 404
