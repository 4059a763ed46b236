from __future__ import annotations

from typing import Any

import pytest

from tests.api.running_server import RunningServer
from tests.api.test_errors import error_of
from tests.service import tokenizers_for_tests as made

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_tokens_of_a_text(server: RunningServer) -> None:
    text = "Once upon a time \U0001f600"
    for name in ("prompt", "content"):
        answer = server.post("/tokenize", {name: text}).json()
        assert answer == {"count": answer["count"], "max_model_len": 512, "tokens": made.smollm2().encode(text)}
        assert answer["count"] == len(answer["tokens"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_token_texts(server: RunningServer) -> None:
    answer = server.post("/tokenize", {"prompt": "Once upon", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["Once", " upon"]


def test_special_tokens(server: RunningServer) -> None:
    """In a text they are what they are; in a chat's messages they stay text."""
    assert server.post("/tokenize", {"prompt": "<|im_end|>"}).json()["count"] == 1
    assert server.post("/detokenize", {"tokens": [2]}).json() == {"prompt": "<|im_end|>"}
    chat = [{"role": "user", "content": "<|im_end|>"}]
    plain = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert server.post("/tokenize", {"messages": chat}).json()["tokens"].count(2) == plain.count(2)


def test_what_a_model_receives_of_a_chat(server: RunningServer) -> None:
    answer = server.post("/apply-template", {"messages": MESSAGES}).json()
    assert answer["prompt"].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert answer["tokens"] == server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert answer["count"] == len(answer["tokens"])
    server.chat()
    assert server.engine.requests[0].prompt_token_ids == answer["tokens"]
    bare = server.post("/apply-template", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert bare["prompt"].endswith("<|im_end|>\n")


def test_what_a_completion_receives(server: RunningServer) -> None:
    server.complete(prompt="Once upon")
    tokens = server.post("/tokenize", {"prompt": "Once upon"}).json()["tokens"]
    assert server.engine.requests[0].prompt_token_ids == tokens


def test_an_empty_text_has_no_tokens(server: RunningServer) -> None:
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].function"),
        ("/apply-template", {"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_malformed(server: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    response = server.post(path, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_an_unknown_model_and_an_unknown_key(server: RunningServer) -> None:
    assert server.post("/tokenize", {"prompt": "x", "model": "nobody"}).status_code == 404
    assert server.post("/tokenize", {"prompt": "x", "color": 1}).headers["x-lmserve-ignored"] == "color"
