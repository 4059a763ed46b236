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
OURS = {"model": {"type", "state", "max_context_length", "loaded_context_length", "capabilities", "lane"}}
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


COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"n": 2, "logprobs": 0},
    {"prompt": ["a b", "c"]},
    {"echo": True},
]


@pytest.mark.parametrize("fields", COMPLETIONS)
def test_a_completion(starter_server: Server, fields: dict[str, Any]) -> None:
    fits(post(starter_server, "completions", {**PROMPT, **fields}), Completion)


@pytest.mark.parametrize("fields", COMPLETIONS)
def test_chunks_of_a_completion(starter_server: Server, fields: dict[str, Any]) -> None:
    """OpenAI's own chunks have null for a reason that is not there yet, which its package's type does not say."""
    events = post(starter_server, "completions", {**PROMPT, **fields, "stream": True}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        fits(json.dumps(chunk), Completion)


def test_an_echo_with_logprobs(starter_server: Server) -> None:
    """Its first token has no log-probability: null in OpenAI's answers too, and no type in its package."""
    answer = json.loads(post(starter_server, "completions", {**PROMPT, "echo": True, "logprobs": 1}))
    logprobs = answer["choices"][0]["logprobs"]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}
    fits(json.dumps(answer), Completion)


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", PROMPT)])
def test_under_api_v0_three_fields_more(starter_server: Server, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(f"{starter_server.url}/api/v0/{path}", json=body, timeout=120).json()
    assert all(answer.pop(name) for name in ("stats", "model_info", "runtime"))
    fits(json.dumps(answer), ChatCompletion if "chat" in path else Completion)


def test_models(starter_server: Server) -> None:
    listed = httpx.get(f"{starter_server.url}/v1/models").json()
    assert listed["object"] == "list"
    fits(json.dumps(listed["data"][0]), Model)
    fits(httpx.get(f"{starter_server.url}/v1/models/{listed['data'][0]['id']}").text, Model)
