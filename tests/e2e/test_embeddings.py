"""Embeddings from a real server with all-MiniLM-L6-v2, by people's clients, against sentence-transformers."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding  # type: ignore[import-untyped]
from numpy.typing import NDArray
from pydantic import SecretStr
from sentence_transformers import SentenceTransformer

from lmserve.models.starter import STARTERS, find_source
from tests.e2e.serving import Server, start
from tests.e2e.test_litellm import litellm
from tests.e2e.test_process import LogListener
from tests.runtime.encoder.tiny_encoders import write_encoder

MODEL = "all-minilm-l6-v2"
LONGEST = 256
TOLERANCE = 1e-5
TEXTS = ["Once upon a time, there was a cat.", "A dog barked.", "naïve café 東京", "a"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    """A chat model is loaded; the starter for embeddings is known, and comes when it is asked for."""
    folder = tmp_path_factory.mktemp("embeddings")
    reranker = write_encoder(folder / "reranker", "bert", num_labels=1)
    arguments = (f"chat={tiny_folder}", "--alias", f"reranker={reranker}", "--max-model-len", "1000")
    with start(folder, *arguments, "--kv-cache-memory", "16MiB", HF_HUB_CACHE=str(folder / "hub")) as running:
        yield running


@pytest.fixture(scope="module")
def theirs() -> SentenceTransformer:
    return SentenceTransformer(str(find_source(STARTERS[MODEL])), device="cpu")


def difference(vectors: Any, expected: NDArray[np.float32]) -> float:
    got = np.asarray(vectors, np.float32)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max())


def test_the_official_client(server: Server, theirs: SentenceTransformer) -> None:
    expected = theirs.encode(TEXTS)
    answer = server.client().embeddings.create(input=TEXTS, model=MODEL)
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    assert difference([each.embedding for each in answer.data], expected) <= TOLERANCE
    lengths = [len(ids) for ids in theirs.tokenizer(TEXTS)["input_ids"]]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)
    assert answer.model == MODEL
    floats = server.client().embeddings.create(input=TEXTS, model=MODEL, encoding_format="float")
    body = {"input": TEXTS, "model": MODEL, "encoding_format": "base64"}
    raw = httpx.post(f"{server.url}/v1/embeddings", json=body).json()["data"]
    for number, text in zip(floats.data, raw, strict=True):
        assert struct.pack("<384f", *number.embedding) == base64.b64decode(text["embedding"]), "the same bits"


def test_the_order_of_many_texts(server: Server, theirs: SentenceTransformer) -> None:
    """More than a step holds, of all lengths: computed longest first, answered as they came."""
    draw = random.Random(1)
    texts = [" ".join(f"{number}" for _ in range(draw.randint(1, 30))) for number in range(300)]
    answer = server.client().embeddings.create(input=texts, model=MODEL)
    assert [each.index for each in answer.data] == list(range(300))
    assert difference([each.embedding for each in answer.data], theirs.encode(texts)) <= TOLERANCE
    assert answer.usage.prompt_tokens == sum(len(ids) for ids in theirs.tokenizer(texts)["input_ids"])


def test_token_ids_are_the_same_as_their_text(server: Server, theirs: SentenceTransformer) -> None:
    url = f"{server.url}/tokenize"
    ids = [httpx.post(url, json={"prompt": text, "model": MODEL}).json()["tokens"] for text in TEXTS]
    assert ids == theirs.tokenizer(TEXTS)["input_ids"]
    client = server.client()
    one = client.embeddings.create(input=ids[0], model=MODEL).data[0].embedding
    many = [each.embedding for each in client.embeddings.create(input=ids, model=MODEL).data]
    expected = theirs.encode(TEXTS)
    assert difference([one], expected[:1]) <= TOLERANCE
    assert difference(many, expected) <= TOLERANCE


def test_fewer_dimensions(server: Server, theirs: SentenceTransformer) -> None:
    expected = theirs.encode(TEXTS)[:, :64]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    answer = server.client().embeddings.create(input=TEXTS, model=MODEL, dimensions=64)
    assert difference([each.embedding for each in answer.data], expected) <= TOLERANCE


def test_langchain(server: Server, theirs: SentenceTransformer) -> None:
    with openai.DefaultHttpxClient() as http:
        made = OpenAIEmbeddings(
            base_url=f"{server.url}/v1",
            api_key=SecretStr("any"),
            model=MODEL,
            check_embedding_ctx_length=False,  # else it sends the ids of another tokenizer
            http_client=http,
        )
        assert difference(made.embed_documents(TEXTS), theirs.encode(TEXTS)) <= TOLERANCE
        assert difference([made.embed_query(TEXTS[0])], theirs.encode(TEXTS[:1])) <= TOLERANCE


def test_llama_index(server: Server, theirs: SentenceTransformer) -> None:
    with openai.DefaultHttpxClient() as http:
        made = OpenAILikeEmbedding(
            model_name=MODEL, api_base=f"{server.url}/v1", api_key="any", embed_batch_size=3, http_client=http
        )
        assert difference(made.get_text_embedding_batch(TEXTS), theirs.encode(TEXTS)) <= TOLERANCE
        assert difference([made.get_query_embedding(TEXTS[1])], theirs.encode(TEXTS[1:2])) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning")
def test_litellm(server: Server, theirs: SentenceTransformer) -> None:
    where = {"api_base": f"{server.url}/v1", "api_key": "any", "encoding_format": "float"}
    answer = litellm.embedding(model=f"openai/{MODEL}", input=TEXTS, **where)
    assert difference([each["embedding"] for each in answer.data], theirs.encode(TEXTS)) <= TOLERANCE


@pytest.mark.slow
def test_a_thousand_texts_in_a_concurrent_mix(server: Server, theirs: SentenceTransformer) -> None:
    """From one token to the longest, in requests of all sizes at once, and the small ones again alone."""
    draw = random.Random(0)
    words = [word for word in (Path(__file__).parents[2] / "README.md").read_text().split() if word.isalpha()]
    lengths = [1, 2, *(min(180, int(draw.lognormvariate(2.5, 1.0)) + 1) for _ in range(994))]
    texts = [" ".join(draw.choices(words, k=length)) for length in lengths]
    texts += ["cat " * (LONGEST - 2)] * 2 + ["\n", "a"]
    fitting = [len(ids) <= LONGEST for ids in theirs.tokenizer(texts)["input_ids"]]
    texts = [text if fits else "too long" for text, fits in zip(texts, fitting, strict=True)]
    assert len(texts) == 1000
    assert sum(fitting) > 980
    expected = theirs.encode(texts, batch_size=32)
    got = np.zeros_like(expected)
    pieces, start_ = [], 0
    while start_ < len(texts):
        size = draw.choice((1, 2, 5, 30, 120))
        pieces.append(range(start_, min(len(texts), start_ + size)))
        start_ += size
    with httpx.Client(base_url=server.url, timeout=120) as http:

        def ask(piece: range) -> None:
            body = {"input": [texts[i] for i in piece], "model": MODEL, "encoding_format": "float"}
            answer = http.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            for i, each in zip(piece, answer.json()["data"], strict=True):
                got[i] = each["embedding"]

        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            list(threads.map(ask, pieces))
        assert difference(got, expected) <= TOLERANCE
        together = got.copy()
        for i in range(0, 1000, 50):
            ask(range(i, i + 1))
        assert difference(got, together) <= TOLERANCE


def num_queued(server: Server) -> int:
    """Inputs that wait in the embedding model's worker, as of its last step."""
    models = httpx.get(f"{server.url}/api/v1/models").json()["models"]
    (instance,) = next(each["loaded_instances"] for each in models if each["key"] == MODEL)
    return int(instance["num_queued"])


def test_a_client_that_goes_away_stops_the_work(server: Server) -> None:
    """A text that comes later is in the next step: what waits beside it when it is answered was not stopped."""
    client = server.client()
    client.embeddings.create(input="a", model=MODEL)  # a load would hold the request up before its work begins
    log = LogListener(server.url, "embedding.output", 1000)
    body = json.dumps({"model": MODEL, "input": ["cat " * 200] * 1000})
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        assert log.has_input.wait(30)
        client.embeddings.create(input="a", model=MODEL)
        assert num_queued(server) > 0, "the work goes on beside other people's"
    ended = log.wait()[-1]
    assert (ended["status"], ended["inputsCount"]) == ("userStopped", 1000)
    assert ended["inputsDone"] < 1000
    client.embeddings.create(input="a", model=MODEL)
    assert num_queued(server) == 0


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "cat " * 300}, ["256", "302"]),
        ({"input": ["a", "cat " * 300]}, ["input[1]", "256", "302"]),
        ({"input": ""}, ["must not be empty"]),
        ({"input": ["a", ""]}, ["input[1]", "must not be empty"]),
        ({"input": []}, ["empty"]),
        ({"input": [[1, 2], []]}, ["input[1]", "must not be empty"]),
        ({"input": ["a"] * 2049}, ["2049", "2048"]),
        ({"input": "a", "dimensions": 385}, ["384"]),
        ({"input": "a", "model": "chat"}, ["chat", "makes no embeddings"]),
        ({"input": "a", "model": "reranker"}, ["reranker", "makes no embeddings"]),
    ],
)
def test_refusals(server: Server, body: dict[str, object], words: list[str]) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": MODEL, **body})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert all(word in message for word in words), message


def test_an_encoder_does_not_chat(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="makes embeddings: it cannot generate text"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="scores pairs of texts: it cannot generate text"):
        client.completions.create(model="reranker", prompt="Hi")


def test_a_reranker_comes_when_it_is_asked_for(server: Server) -> None:
    documents = ["one", "two two", "three three three"]
    ranked = httpx.post(f"{server.url}/v1/rerank", json={"query": "which", "documents": documents}, timeout=60).json()
    body = {"text_1": "which", "text_2": documents, "model": "reranker"}
    scores = [each["score"] for each in httpx.post(f"{server.url}/v1/score", json=body).json()["data"]]
    assert ranked["model"] == "reranker"
    assert [each["index"] for each in ranked["results"]] == sorted(range(3), key=lambda i: -scores[i])
    assert [each["relevance_score"] for each in ranked["results"]] == sorted(scores, reverse=True)


def test_all_are_listed_with_their_types(server: Server) -> None:
    models = {each["id"]: each for each in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert {name: models[name]["type"] for name in ("chat", MODEL, "reranker")} == {
        "chat": "llm",
        MODEL: "embeddings",
        "reranker": "reranker",
    }
    assert models[MODEL]["loaded_context_length"] == LONGEST
    assert models["reranker"]["capabilities"] == ["rerank"]
