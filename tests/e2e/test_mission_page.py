"""Every example of LM Studio's page on its OpenAI endpoints, as written there but for the port."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import STARTER
from tests.e2e.serving import Server, start


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory, starter_folder: Path) -> Iterator[Server]:
    """As a user starts it, but with a short context: the examples set no limit, and the starter model likes to talk."""
    folder = tmp_path_factory.mktemp("page")
    with start(folder, f"{STARTER}={starter_folder}", "--max-model-len", "160") as server:
        yield server


def curl(*arguments: str) -> Any:
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_curl_a_chat(page_server: Server) -> None:
    body = """{
    "model": "use the model identifier from LM Studio here",
    "messages": [{"role": "user", "content": "Say this is a test!"}],
    "temperature": 0.7
  }"""
    url = f"{page_server.url}/v1/chat/completions"
    answer = curl(url, "-H", "Content-Type: application/json", "-d", body)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "smollm2-135m-instruct"
    assert answer["choices"][0]["message"]["content"]


def test_curl_the_models(page_server: Server) -> None:
    """The loaded one, and those that a request would load."""
    models = {model["id"]: model for model in curl(f"{page_server.url}/v1/models")["data"]}
    assert {model["object"] for model in models.values()} == {"model"}
    assert models["smollm2-135m-instruct"]["state"] == "loaded"
    assert "all-minilm-l6-v2" in models


def test_python_a_chat(page_server: Server) -> None:
    client = page_server.client(api_key="lm-studio")
    completion = client.chat.completions.create(
        model="model-identifier",
        messages=[
            {"role": "system", "content": "Always answer in rhymes."},
            {"role": "user", "content": "Introduce yourself."},
        ],
        temperature=0.7,
    )
    message = completion.choices[0].message
    assert message.role == "assistant"
    assert message.content


def test_python_embeddings(page_server: Server) -> None:
    """The starter for embeddings is known and comes when it is asked for, under whatever name."""
    client = page_server.client(api_key="lm-studio")

    def get_embedding(text: str, model: str = "model-identifier") -> list[float]:
        text = text.replace("\n", " ")
        return client.embeddings.create(input=[text], model=model).data[0].embedding

    vector = get_embedding("Once upon a time, there was a cat.")
    assert len(vector) == 384
    assert vector == get_embedding("Once upon a time,\nthere was a cat.")
    test_python_a_chat(page_server)  # the language model still answers to any name


@pytest.mark.parametrize("stream", [False, True])
def test_every_supported_parameter_at_once(page_server: Server, stream: bool) -> None:
    body: dict[str, Any] = {
        "model": "model-identifier",
        "top_p": 0.9,
        "top_k": 40,
        "messages": [{"role": "user", "content": "Count to ten."}],
        "temperature": 0.7,
        "max_tokens": 12,
        "stream": stream,
        "stop": ["\n\n"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": {"5": -100},
        "repeat_penalty": 1.1,
        "seed": 7,
    }
    command = ["curl", "-sS", "-i", f"{page_server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    head, _, answer = done.stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 200")
    assert "x-lmserve-ignored" not in head
    assert answer.rstrip().endswith("data: [DONE]" if stream else "}")


def test_no_limit_as_the_pages_own_examples_write_it(page_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": -1, "stop": ".", "temperature": 0}
    url = f"{page_server.url}/v1/chat/completions"
    answer = curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body))
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_completion_applies_no_template(page_server: Server) -> None:
    url = f"{page_server.url}/v1/completions"
    body = {"model": "any", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}
    answer = curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body))
    assert answer["usage"]["prompt_tokens"] == 4
