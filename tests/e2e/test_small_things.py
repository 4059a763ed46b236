"""Small things that other servers get wrong and real clients send, against the starter model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Server

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


def chat(server: Server, **fields: Any) -> Any:
    body = {"messages": MESSAGES, "max_tokens": 12, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def text(server: Server, **fields: Any) -> str:
    return str(chat(server, **fields).json()["choices"][0]["message"]["content"])


def test_temperature_one_really_samples(starter_server: Server) -> None:
    assert len({text(starter_server, temperature=1, seed=seed) for seed in range(4)}) > 1
    assert len({text(starter_server, temperature=0, seed=seed) for seed in range(2)}) == 1


def test_usage_counts_every_choice(starter_server: Server) -> None:
    answer = chat(starter_server, n=3, ignore_eos=True, seed=1).json()
    assert answer["usage"]["completion_tokens"] == 36
    alone = chat(starter_server, ignore_eos=True).json()["usage"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == alone, "the prompt once"


def test_a_half_matched_stop_string_at_the_end_is_text(starter_server: Server) -> None:
    whole = text(starter_server, temperature=0)
    assert text(starter_server, temperature=0, stop=[whole[-3:] + " and never more"]) == whole
    assert text(starter_server, temperature=0, stop=[whole[5:9]]) == whole[:5]


def test_no_logprobs_and_zero_of_them(starter_server: Server) -> None:
    response = chat(starter_server, logprobs=False, top_logprobs=0)
    assert response.status_code == 200
    assert response.json()["choices"][0]["logprobs"] is None


def test_the_newer_name_of_max_tokens_beside_null(starter_server: Server) -> None:
    answer = chat(starter_server, max_tokens=None, max_completion_tokens=5, ignore_eos=True).json()
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        [],
        [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}],
    ],
)
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
def test_every_role_and_shape_of_content(starter_server: Server, role: str, content: Any) -> None:
    response = chat(starter_server, messages=[{"role": role, "content": content}, *MESSAGES], max_tokens=2)
    assert response.status_code == 200, response.text


def test_invalid_utf8_is_the_clients_error(starter_server: Server) -> None:
    body = json.dumps({"messages": MESSAGES}).encode().replace(b"sea", b"s\xffa")
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{starter_server.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_image_to_a_text_model(starter_server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    response = chat(starter_server, messages=[{"role": "user", "content": [part]}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0]"
    assert isinstance(response.json()["error"]["code"], str)


def test_figures_as_lm_studio_gives_them(starter_server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4}
    answer = httpx.post(f"{starter_server.url}/api/v0/chat/completions", json=body, timeout=120).json()
    info = {"arch": "llama", "quant": "F32", "format": "safetensors", "context_length": 2048}
    assert answer["model_info"] == info
    assert answer["stats"]["time_to_first_token"] > 0
