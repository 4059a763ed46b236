"""litellm against a real server, as it is pointed at any OpenAI-compatible one."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from tests.e2e.serving import Server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it asks the internet for prices

litellm: Any = importlib.import_module("litellm")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Accessing the 'model_:DeprecationWarning"
)  # litellm's own use of pydantic
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def settings(server: Server, **fields: Any) -> dict[str, Any]:
    where = {"model": "openai/smollm2-135m-instruct", "api_base": f"{server.url}/v1", "api_key": "any"}
    return {**where, "temperature": 0, "max_tokens": 8, "num_retries": 0, **fields}


def test_a_chat(starter_server: Server) -> None:
    answer: Any = litellm.completion(messages=MESSAGES, **settings(starter_server))
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8


def test_a_stream_with_usage(starter_server: Server) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks: list[Any] = list(litellm.completion(messages=MESSAGES, **settings(starter_server, **options)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens == 8


async def test_an_async_stream(starter_server: Server) -> None:
    stream: Any = await litellm.acompletion(messages=MESSAGES, **settings(starter_server, stream=True))
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == ANSWER
    await litellm.close_litellm_async_clients()


def test_a_completion(starter_server: Server) -> None:
    fields = settings(starter_server, model="text-completion-openai/smollm2-135m-instruct", max_tokens=4)
    answer: Any = litellm.text_completion(prompt="Once upon a time", **fields)
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].text


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_tokens": 10**6}, litellm.ContextWindowExceededError),
        ({"temperature": 9}, litellm.BadRequestError),
        ({"n": 129}, litellm.BadRequestError),
    ],
)
def test_errors_are_understood(starter_server: Server, fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        litellm.completion(messages=MESSAGES, **settings(starter_server, **fields))
