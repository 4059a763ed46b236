"""The starter model through HTTP, with the official client, against transformers in a plain script."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server

CHATS = (
    "What is the capital of France?",
    "Write one sentence about the sea, with an emoji.",
    "Translate 'good morning' into Spanish.",
    "List three prime numbers.",
    "Who wrote Hamlet?",
    "Explain rain to a child in two sentences.",
)
LENGTH = 32

PLAIN_SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, length, chats = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
answers = []
for chat in chats:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": chat}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=length)
    answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def expected(starter_folder: Path) -> list[str]:
    """What a plain script gets, one by one."""
    arguments = json.dumps([str(starter_folder), LENGTH, CHATS])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_SCRIPT, arguments], capture_output=True, text=True, timeout=300, check=True
    )
    answers: list[str] = json.loads(done.stdout)
    return answers


def ask(server: Server, chat: str, **options: Any) -> str:
    answer = server.client().chat.completions.create(
        model=STARTER, messages=[{"role": "user", "content": chat}], temperature=0, max_tokens=LENGTH, **options
    )
    return answer.choices[0].message.content or ""


def test_greedy_equals_generate_alone(starter_server: Server, expected: list[str]) -> None:
    assert [ask(starter_server, chat) for chat in CHATS] == expected
    assert "Paris" in expected[0]


def test_greedy_equals_generate_all_at_once(starter_server: Server, expected: list[str]) -> None:
    with ThreadPoolExecutor(3 * len(CHATS)) as threads:
        answers = list(threads.map(lambda chat: ask(starter_server, chat), CHATS * 3))
    assert answers == expected * 3


def test_streamed_pieces_are_the_same_text(starter_server: Server, expected: list[str]) -> None:
    stream = starter_server.client().chat.completions.create(
        model=STARTER,
        messages=[{"role": "user", "content": CHATS[1]}],
        temperature=0,
        max_tokens=LENGTH,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected[1]
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens <= LENGTH


def test_a_seeded_answer_does_not_change_under_load(starter_server: Server) -> None:
    def sample(seed: int) -> list[str]:
        answer = starter_server.client().chat.completions.create(
            model=STARTER,
            messages=[{"role": "user", "content": CHATS[5]}],
            temperature=1.0,
            top_p=0.95,
            seed=seed,
            n=2,
            max_tokens=LENGTH,
        )
        return [choice.message.content or "" for choice in answer.choices]

    alone = sample(7)
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(sample, [7, 1, 2, 7, 3, 4, 7, 5]))
    assert [together[i] for i in (0, 3, 6)] == [alone] * 3
    assert len({text for texts in together for text in texts}) == 12


def test_a_second_turn_finds_the_first_in_the_cache(starter_server: Server) -> None:
    client = starter_server.client()
    system: Any = {"role": "system", "content": "You are a patient teacher. " * 8}
    first: list[Any] = [system, {"role": "user", "content": "What is a noun?"}]
    client.chat.completions.create(model=STARTER, messages=first, max_tokens=4)
    second = client.chat.completions.create(
        model=STARTER, messages=[system, {"role": "user", "content": "And a verb?"}], max_tokens=4
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 32


def test_stop_strings_penalties_bias_and_logprobs(starter_server: Server) -> None:
    whole = ask(starter_server, CHATS[0])
    stop = whole[10:14]
    assert ask(starter_server, CHATS[0], stop=[stop]) == whole[: whole.index(stop)]
    assert ask(starter_server, CHATS[0], frequency_penalty=2, presence_penalty=2) != ""
    answer = starter_server.client().chat.completions.create(
        model=STARTER,
        messages=[{"role": "user", "content": CHATS[0]}],
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
        logit_bias={"339": -100},
        extra_body={"repeat_penalty": 1.1, "min_p": 0.05, "top_k": 40},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3


def test_completions_apply_no_template(starter_server: Server) -> None:
    client = starter_server.client()
    answer = client.completions.create(model=STARTER, prompt="1, 2, 3, 4, 5,", max_tokens=6, temperature=0)
    assert answer.choices[0].text.startswith(" 6")
    assert answer.usage is not None
    both = client.completions.create(model=STARTER, prompt=["1, 2, 3,", "a, b, c,"], max_tokens=4, temperature=0, n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text
    assert both.usage is not None
    assert both.usage.completion_tokens == 16


def test_models(starter_server: Server) -> None:
    client = starter_server.client()
    (model,) = (model for model in client.models.list().data if model.id == STARTER)
    assert model.to_dict()["state"] == "loaded"
    assert client.models.retrieve(STARTER) == model
    lengths = model.to_dict()
    assert (lengths["max_context_length"], lengths["loaded_context_length"]) == (8192, 2048)
    assert lengths["capabilities"] == ["completion", "chat"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_errors_reach_the_official_client(starter_server: Server) -> None:
    client = starter_server.client()
    message: list[Any] = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=STARTER, messages=message, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=STARTER, messages=message, max_tokens=3000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=STARTER,
            messages=message,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
        )
    assert caught.value.param == "tools[0].function.parameters.type"


def test_the_log_stream_shows_what_the_model_received(starter_server: Server) -> None:
    events: list[dict[str, Any]] = []
    listening = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{starter_server.url}/log/stream", timeout=60) as answer:
            listening.set()
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    events.append(json.loads(line[5:]))
                    if events[-1]["type"] == "llm.prediction.output":
                        return

    listener = threading.Thread(target=listen)
    listener.start()
    assert listening.wait(30)
    answer = ask(starter_server, CHATS[0])
    listener.join(60)
    received, answered = events
    assert received["type"] == "llm.prediction.input"
    assert received["input"].endswith(f"<|im_start|>user\n{CHATS[0]}<|im_end|>\n<|im_start|>assistant\n")
    assert answered["output"] == answer
    assert received["request_id"] == answered["request_id"]
    assert answered["stats"]["stopReason"] in ("eosFound", "maxPredictedTokensReached")
    assert answered["stats"]["predictedTokensCount"] > 0


def test_the_curl_line_that_the_server_prints_works(starter_server: Server) -> None:
    deadline = time.monotonic() + 10
    while "curl" not in starter_server.stderr.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    said = starter_server.stderr.read_text().splitlines()
    line = next(line.strip() for line in said if line.strip().startswith("curl"))
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens"] <= 64, "the answer has no bound, and a small model may not find its end"
    assert '"max_tokens": 64' in line
