"""Every answer as the openai package's own types see it, in strict mode: nothing missing, nothing of another kind."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pydantic
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.e2e.serving import Server

CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8}
PROMPT = {"prompt": "Once upon a time", "max_tokens": 4}
OURS = {"model": {"type", "state", "max_context_length", "loaded_context_length", "capabilities"}}
"""What answers have beyond OpenAI's, on purpose."""


def fits(body: str, kind: type[pydantic.BaseModel], path: str = "answer") -> None:
    kind.model_validate_json(body, strict=True)
    nothing_more(json.loads(body), kind.model_validate_json(body), path)


def nothing_more(value: Any, parsed: Any, path: str) -> None:
    """No key that the type does not have."""
    if isinstance(parsed, pydantic.BaseModel):
        unknown = set(parsed.model_extra or {}) - OURS.get(value.get("object"), set())
        assert not unknown, f"{path} has {unknown}"
        for name in value.keys() & type(parsed).model_fields.keys():
            nothing_more(value[name], getattr(parsed, name), f"{path}.{name}")
    elif isinstance(parsed, list):
        for item, parsed_item in zip(value, parsed, strict=True):
            nothing_more(item, parsed_item, path)


def post(server: Server, path: str, body: dict[str, Any]) -> str:
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.text


LOGPROBS = [{}, {"logprobs": True, "top_logprobs": 3}, {"n": 2, "temperature": 0.9}]


@pytest.mark.parametrize("fields", LOGPROBS)
def test_a_chat(starter_server: Server, fields: dict[str, Any]) -> None:
    fits(post(starter_server, "chat/completions", {**CHAT, **fields}), ChatCompletion)


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("fields", LOGPROBS)
def test_chunks(starter_server: Server, fields: dict[str, Any], include_usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": include_usage}}
    events = post(starter_server, "chat/completions", {**CHAT, **fields, **options}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        fits(event.removeprefix("data: "), ChatCompletionChunk)


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"n": 2, "logprobs": 0}, {"prompt": ["a b", "c"]}])
def test_a_completion(starter_server: Server, fields: dict[str, Any]) -> None:
    fits(post(starter_server, "completions", {**PROMPT, **fields}), Completion)


def test_models(starter_server: Server) -> None:
    listed = httpx.get(f"{starter_server.url}/v1/models").json()
    assert listed["object"] == "list"
    fits(json.dumps(listed["data"][0]), Model)
    fits(httpx.get(f"{starter_server.url}/v1/models/{listed['data'][0]['id']}").text, Model)
