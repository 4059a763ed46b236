"""Nothing is dropped silently: each field is honoured, refused by name, or reported."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params as completion_params
from openai.types import embedding_create_params as embedding_params
from openai.types.chat import completion_create_params as chat_params

from lmserve.api.schema.chat import ChatCompletionRequest
from lmserve.api.schema.completions import CompletionRequest
from lmserve.api.schema.embeddings import EmbeddingRequest
from lmserve.api.schema.fields import Treatment, table
from lmserve.api.schema.page import page
from tests.api.running_server import RunningServer

ROOT = Path(__file__).parent.parent.parent

ASKING: dict[str, list[Any]] = {
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "parallel_tool_calls": ["yes"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "reasoning_effort": ["low"],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text", "audio"]],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "moderation": [{"model": "x"}],
    "images": [["data:"]],
    "echo": [True],
    "suffix": ["end"],
    "guided_json": [{"type": "object"}],
    "guided_regex": ["a+"],
    "guided_choice": [["a", "b"]],
    "guided_grammar": ["root ::= x"],
    "structured_outputs": [{"regex": "a"}],
    "json_schema": [{}],
    "grammar": ["root ::= x"],
    "regex": ["a"],
    "format": ["json"],
}
"""Of each refused field, values that ask for something."""


def rows_of(body: type[msgspec.Struct], treatment: Treatment) -> list[str]:
    return [name for name, row in table(body).items() if row.treatment is treatment]


def asking(body: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    return [(name, value) for name in rows_of(body, Treatment.REFUSED) for value in ASKING[name]]


def error_of(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


OPENAI: list[tuple[type[msgspec.Struct], Any]] = [
    (ChatCompletionRequest, chat_params.CompletionCreateParamsNonStreaming),
    (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
    (CompletionRequest, completion_params.CompletionCreateParamsNonStreaming),
    (CompletionRequest, completion_params.CompletionCreateParamsStreaming),
    (EmbeddingRequest, embedding_params.EmbeddingCreateParams),
]


@pytest.mark.parametrize(("body", "params"), OPENAI)
def test_every_field_of_the_openai_package_is_in_the_table(body: type[msgspec.Struct], params: Any) -> None:
    known = table(body)
    assert set(typing.get_type_hints(params)) - set(known) == set()


def test_every_field_of_lm_studios_list_is_honoured() -> None:
    """The mission page, "Supported payload parameters"."""
    names = ["model", "top_p", "top_k", "messages", "temperature", "max_tokens", "stream", "stop", "seed"]
    for name in [*names, "presence_penalty", "frequency_penalty", "logit_bias", "repeat_penalty"]:
        assert table(ChatCompletionRequest)[name].treatment is Treatment.HONOURED
        assert name == "messages" or table(CompletionRequest)[name].treatment is Treatment.HONOURED


@pytest.mark.parametrize("body", [ChatCompletionRequest, CompletionRequest, EmbeddingRequest])
def test_every_row_says_what_it_has_to(body: type[msgspec.Struct]) -> None:
    for row in table(body).values():
        assert row.kind
        assert row.help


def test_the_page_is_fresh() -> None:
    """If not: python -m lmserve.api.schema.page > docs/request-fields.md"""
    assert (ROOT / "docs/request-fields.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(("name", "value"), asking(ChatCompletionRequest))
def test_refused_in_chat(server: RunningServer, name: str, value: Any) -> None:
    error = error_of(server.chat(**{name: value}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]
    assert server.engine.requests == []


@pytest.mark.parametrize(("name", "value"), asking(CompletionRequest))
def test_refused_in_completions(server: RunningServer, name: str, value: Any) -> None:
    error = error_of(server.complete(**{name: value}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_values_that_ask_for_nothing(server: RunningServer) -> None:
    rows = [row for row in table(ChatCompletionRequest).values() if row.harmless]
    assert len(rows) > 4
    for harmless in ({row.name: row.harmless[0] for row in rows}, {row.name: row.harmless[-1] for row in rows}):
        response = server.chat(**harmless, logprobs=False, top_logprobs=0, chat_template_kwargs={})
        assert response.status_code == 200
        assert "x-lmserve-ignored" not in response.headers
    assert server.complete(suffix="", best_of=1, logprobs=None).status_code == 200


def test_null_is_the_same_as_absent(server: RunningServer) -> None:
    everything: dict[str, None] = dict.fromkeys(table(ChatCompletionRequest))
    del everything["messages"]
    response = server.chat(**everything)
    assert response.status_code == 200, response.text
    assert "x-lmserve-ignored" not in response.headers
    everything = dict.fromkeys(table(CompletionRequest))
    del everything["prompt"]
    assert server.complete(**everything).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", ChatCompletionRequest), ("/v1/completions", CompletionRequest)]
)
def test_ignored_fields_are_reported(server: RunningServer, path: str, body: type[msgspec.Struct]) -> None:
    names = rows_of(body, Treatment.IGNORED)
    required = {"messages": [{"role": "user", "content": "Hi"}]} if body is ChatCompletionRequest else {"prompt": "Hi"}
    response = server.post(path, {**required, **dict.fromkeys(names, "x")})
    assert response.status_code == 200
    assert response.headers["x-lmserve-ignored"].split(", ") == names


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_reported(server: RunningServer, stream: bool) -> None:
    response = server.chat(
        stream=stream,
        user="ann",
        store=True,
        metadata={"a": 1},
        my_field=[1],
        stream_options={"include_obfuscation": False},
    )
    assert response.status_code == 200
    reported = response.headers["x-lmserve-ignored"].split(", ")
    assert reported == ["user", "store", "metadata", "my_field", "stream_options.include_obfuscation"]


def test_a_reported_name_cannot_break_the_header(server: RunningServer) -> None:
    response = server.chat(**{"a\r\nset-cookie: x": 1, "\u00fc": 1})
    assert response.headers["x-lmserve-ignored"] == "a%0D%0Aset-cookie%3A%20x, %C3%BC"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"seed": 1e300}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"priority": 2**40}, "priority"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 3}, "model"),
    ],
)
def test_malformed_in_both(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    for error in (error_of(server.chat(**fields)), error_of(server.complete(**fields))):
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert param in error["message"]
        for python_name in ("float", "str`", "dict", "NoneType", "bool "):
            assert python_name not in error["message"]
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt"),
    ],
)
def test_malformed_in_chat(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    assert error_of(server.chat(**fields))["param"] == param


@pytest.mark.parametrize(("logprobs", "param"), [(21, "logprobs"), (True, "logprobs"), (-1, "logprobs")])
def test_malformed_in_completions(server: RunningServer, logprobs: Any, param: str) -> None:
    assert error_of(server.complete(logprobs=logprobs))["param"] == param


def test_a_required_field(server: RunningServer) -> None:
    error = error_of(server.post("/v1/chat/completions", {}))
    assert (error["param"], error["message"]) == ("messages", "messages is required.")
