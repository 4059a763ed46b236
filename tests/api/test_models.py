from __future__ import annotations

import openai
import pytest

from tests.api.running_server import RunningServer


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
        "capabilities": ["chat", "completion"],
    }


def test_one_that_is_loading_is_not_listed_but_known(server: RunningServer) -> None:
    server.entry.state = "loading"
    assert server.get("/v1/models").json() == {"object": "list", "data": []}
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
    }
    assert server.get("/api/v0/models").json() == {"object": "list", "data": [item]}
    assert server.get("/api/v0/models/org/stub").json() == item
    assert server.get("/api/v0/models/nobody").json()["error"]["code"] == "model_not_found"
    server.entry.state = "loading"
    loading = server.get("/api/v0/models").json()["data"][0]
    assert (loading["state"], loading["arch"], loading["max_context_length"]) == ("loading", None, None)
