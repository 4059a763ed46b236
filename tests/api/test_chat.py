from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.running_server import RunningServer, goes_on, says
from tests.service import tokenizers_for_tests as made

HI: Any = [{"role": "user", "content": "Hi"}]


def events(text: str) -> list[Any]:
    """The data of a stream's events."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


def test_an_answer(server: RunningServer) -> None:
    server.engine.num_cached_tokens = 3
    answer = server.client.chat.completions.create(model="stub", messages=HI)
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "org/stub"
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == "fp_stub"
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello there!")
    prompt = made.smollm2().tokenizer.apply_chat_template(HI, add_generation_prompt=True, return_dict=False)
    [sent] = server.engine.requests
    assert sent.prompt_token_ids == prompt
    assert sent.eos_token_ids == [0, 2]
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == len(made.smollm2().encode_rendered("Hello there!")) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_the_answer_has_openais_shape_and_nothing_of_ours(server: RunningServer) -> None:
    body = server.chat(logprobs=True, top_logprobs=2).json()
    known = ChatCompletion.model_validate(body, strict=True)
    assert body == known.model_dump(exclude_unset=True)
    assert not known.model_extra


def test_the_async_client(server: RunningServer) -> None:
    async def scenario() -> str:
        async with server.async_client as client:
            stream = await client.chat.completions.create(model="stub", messages=HI, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(scenario()) == "Hello there!"


def test_a_stream(server: RunningServer) -> None:
    response = server.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    for chunk in chunks:
        known = ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk == known.model_dump(exclude_unset=True)
        assert not known.model_extra
        assert "usage" not in chunk
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Hello there!"
    assert all(set(delta) == {"content"} and delta["content"] for delta in deltas[1:-1])
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_usage_at_the_end_of_a_stream(server: RunningServer) -> None:
    *chunks, last, _ = events(server.chat(stream=True, stream_options={"include_usage": True}).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(made.smollm2().encode_rendered("Hello there!")) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(server: RunningServer, stream: bool) -> None:
    texts = ["One.", "Two, and more.", "\U0001f9d1\u200d\U0001f680 \u4f60\u597d"]
    server.engine.script = says(*texts)
    if stream:
        got = ["", "", ""]
        roles, reasons = [], []
        for chunk in server.client.chat.completions.create(model="stub", messages=HI, n=3, stream=True):
            [choice] = chunk.choices
            got[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            reasons += [choice.index] if choice.finish_reason else []
            assert "\ufffd" not in (choice.delta.content or "")
        assert sorted(roles) == sorted(reasons) == [0, 1, 2]
    else:
        answer = server.client.chat.completions.create(model="stub", messages=HI, n=3)
        got = [choice.message.content or "" for choice in answer.choices]
    assert got == texts


def test_a_stop_string(server: RunningServer) -> None:
    server.engine.script = says("one two three")
    streamed = events(server.chat(stream=True, stop=["two", "never"]).text)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == "one "
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    answer = server.chat(stop="two").json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_longest_answer_fills_the_context(server: RunningServer) -> None:
    server.engine.script = goes_on
    answer = server.chat().json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: RunningServer, stream: bool) -> None:
    server.engine.script = says("a\U0001f600")
    response = server.chat(stream=stream, logprobs=True, top_logprobs=2)
    if stream:
        chunks = events(response.text)[:-1]
        content = [
            entry
            for chunk in chunks
            if chunk["choices"][0]["logprobs"]
            for entry in chunk["choices"][0]["logprobs"]["content"]
        ]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "a\U0001f600"
    assert content[0]["token"] == "a"
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


def test_every_sampling_parameter_arrives(server: RunningServer) -> None:
    fields = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 40.0,
        "min_p": 0.05,
        "typical_p": 0.95,
        "repeat_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 10, "6": -100},
        "seed": 2**63 - 1,
        "stop_token_ids": [7],
        "max_completion_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 5,
        "priority": -3,
    }
    server.engine.script = goes_on
    assert server.chat(**fields).status_code == 200
    [sent] = server.engine.requests
    sampling = sent.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 40, 0.05)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.95, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 0.5)
    assert sampling.logit_bias == ((5, 10.0), (6, -100.0))
    assert (sampling.seed, sampling.stop_token_ids, sampling.max_tokens) == (2**63 - 1, (7,), 9)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.n, sampling.logprobs) == (2, True, 2, 5)
    assert sent.priority == -3


def test_null_is_absent(server: RunningServer) -> None:
    sampling = ["temperature", "top_p", "top_k", "stop", "seed", "max_tokens", "n", "logit_bias", "logprobs"]
    names = [*sampling, "stream", "stream_options", "tools", "user", "model"]
    response = server.chat(**dict.fromkeys(names))
    assert response.status_code == 200
    assert "x-lmserve-ignored" not in response.headers


def test_a_final_message_is_continued(server: RunningServer) -> None:
    messages = [*HI, {"role": "assistant", "content": "It is"}]
    assert server.chat(messages=messages, continue_final_message=True).status_code == 200
    [sent] = server.engine.requests
    assert made.smollm2().decode(sent.prompt_token_ids, skip_special_tokens=False).endswith("assistant\nIt is")


def test_a_chat_with_tool_results_in_its_history(server: RunningServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]},
        {"role": "developer", "content": ""},
    ]
    assert server.chat(messages=messages).status_code == 200
