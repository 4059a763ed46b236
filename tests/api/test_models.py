from __future__ import annotations

from dataclasses import replace

import openai
import pytest

from lmserve.models.facts import ModelFacts
from tests.api.running_server import RunningServer

FACTS = ModelFacts(
    type="vlm",
    architecture="SomeForConditionalGeneration",
    model_type="some",
    num_parameters=10**9,
    size_bytes=600 * 10**6,
    format="gguf",
    quantization="Q4_K_M",
    bits_per_weight=4.8,
    context_length=4096,
    capabilities=("chat", "vision"),
)


def test_the_loaded_models(server: RunningServer) -> None:
    server.chat()
    [model] = server.client.models.list().data
    assert (model.id, model.object, model.created, model.owned_by) == ("org/stub", "model", 1_700_000_000, "lmserve")
    [item] = server.get("/v1/models").json()["data"]
    assert item == {
        "id": "org/stub",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "lmserve",
        "type": "llm",
        "state": "loaded",
        "max_context_length": 512,
        "loaded_context_length": 512,
        "capabilities": [],
        "lane": "none",
    }


def test_what_the_files_say_of_a_model_that_is_not_loaded(server: RunningServer) -> None:
    server.entry.state = "not-loaded"
    server.entry.facts = FACTS
    [item] = server.get("/v1/models").json()["data"]
    assert (item["type"], item["state"], item["capabilities"]) == ("vlm", "not-loaded", ["chat", "vision"])
    assert (item["max_context_length"], item["loaded_context_length"]) == (4096, None)
    details = server.get("/api/v0/models/ORG/stub").json()
    assert (details["arch"], details["quantization"], details["type"]) == ("some", "Q4_K_M", "vlm")
    assert (details["state"], details["max_context_length"]) == ("not-loaded", 4096)


def test_a_model_that_was_quantized_at_its_load_says_so(server: RunningServer) -> None:
    server.entry.facts = FACTS
    assert server.get("/api/v0/models/org/stub").json()["quantization"] == "Q4_K_M"
    engine = server.entry.loaded_engine
    engine.info = replace(engine.info, dtype="int8 and bfloat16")
    assert server.get("/api/v0/models/org/stub").json()["quantization"] == "INT8"


def test_without_just_in_time_loading_only_the_loaded_ones_are_listed(server: RunningServer) -> None:
    server.entry.state = "loading"
    server.models.just_in_time = False
    assert server.get("/v1/models").json() == {"object": "list", "data": []}
    server.models.just_in_time = True
    [item] = server.get("/v1/models").json()["data"]
    assert item["state"] == "loading"
    item = server.get("/v1/models/org/stub").json()
    assert (item["state"], item["max_context_length"]) == ("loading", None)


def test_by_id(server: RunningServer) -> None:
    assert server.client.models.retrieve("org/stub").id == "org/stub"
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"
    assert "org/stub" in str(caught.value)


def test_as_lm_studio_lists_them(server: RunningServer) -> None:
    item = {
        "id": "org/stub",
        "object": "model",
        "type": "llm",
        "publisher": "org",
        "arch": "Stub",
        "compatibility_type": "safetensors",
        "quantization": "F32",
        "state": "loaded",
        "max_context_length": 512,
        "loaded_context_length": 512,
        "capabilities": [],
    }
    assert server.get("/api/v0/models").json() == {"object": "list", "data": [item]}
    assert server.get("/api/v0/models/org/stub").json() == item
    assert server.get("/api/v0/models/nobody").json()["error"]["code"] == "model_not_found"
    server.entry.state = "loading"
    loading = server.get("/api/v0/models").json()["data"][0]
    assert (loading["state"], loading["arch"], loading["max_context_length"]) == ("loading", None, None)
