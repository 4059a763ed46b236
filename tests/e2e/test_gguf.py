"""A GGUF file, over HTTP: the answers of the folder that it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import httpx
import pytest
from transformers import AutoModelForCausalLM

from tests.e2e.serving import Server, start
from tests.runtime.gguf.gguf_files import write
from tests.tiny_folder import SPECIAL, TEMPLATE, write_tiny_folder


def write_words(writer: gguf.GGUFWriter, folder: Path) -> None:
    """The folder's tokenizer, as a converter writes it."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(state["model"]["vocab"], key=lambda token: int(state["model"]["vocab"][token]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in SPECIAL else kinds.NORMAL for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))  # nothing is merged, and an empty list of merges is no key
    writer.add_chat_template(TEMPLATE)
    pad, begin, end = (tokens.index(token) for token in SPECIAL)
    writer.add_pad_token_id(pad)
    writer.add_bos_token_id(begin)
    writer.add_eos_token_id(end)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    folder = write_tiny_folder(models / "folder", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    write(models / "tiny.gguf", "llama", model, words=lambda writer: write_words(writer, folder))
    asked = ["--max-model-len", "1000", "--dtype", "float32"]
    with start(tmp_path_factory.mktemp("server"), f"a={folder}", f"b={models / 'tiny.gguf'}", *asked) as running:
        yield running


def test_chats_are_answered_alike(server: Server) -> None:
    with server.client() as client:
        for question in ("Hello  world,\n\n\tit's 12345 o'clock", "naïve café, 東京, 😀"):
            answers = [
                client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
                )
                for name in ("a", "b")
            ]
            texts = [answer.choices[0].message.content for answer in answers]
            assert texts[0] == texts[1] != ""
            assert answers[0].usage == answers[1].usage


def test_it_is_listed_with_its_lane(server: Server) -> None:
    listed = {model["id"]: model for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert listed["a"]["lane"] == listed["b"]["lane"] == "packed"
