from __future__ import annotations

from typing import Any

import pytest

from tests.api.running_server import RunningServer
from tests.api.stub_engine import StubEngine, runner_info
from tests.api.test_errors import error_of
from tests.service import tokenizers_for_tests as made

DOCUMENTS = ["one", "one two three", "one two"]


def ask(server: RunningServer, path: str, **body: object) -> Any:
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    return response.json()


def num_tokens(first: str, second: str) -> int:
    return len(made.smollm2().encode_pairs([(first, second)])[0].token_ids)


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_the_best_document_first(server: RunningServer, path: str) -> None:
    """The stub's score is the number of tokens of the pair."""
    answer = ask(server, path, query="which", documents=DOCUMENTS)
    scores = [num_tokens("which", document) for document in DOCUMENTS]
    assert [each["index"] for each in answer["results"]] == [1, 2, 0]
    assert [each["relevance_score"] for each in answer["results"]] == [scores[1], scores[2], scores[0]]
    assert [each["document"]["text"] for each in answer["results"]] == [DOCUMENTS[1], DOCUMENTS[2], DOCUMENTS[0]]
    assert answer["usage"] == {"prompt_tokens": sum(scores), "total_tokens": sum(scores)}
    assert (answer["model"], answer["id"][:7]) == ("org/stub", "rerank-")
    assert server.models.tasks[-1] == "score"


def test_only_the_best_and_without_texts(server: RunningServer) -> None:
    documents = [{"text": document} for document in DOCUMENTS]
    answer = ask(server, "/v1/rerank", query="which", documents=documents, top_n=2, return_documents=False)
    assert [set(each) for each in answer["results"]] == [{"index", "relevance_score"}] * 2
    assert len(ask(server, "/v1/rerank", query="which", documents=documents, top_n=9)["results"]) == 3


def test_equal_documents_stay_in_order(server: RunningServer) -> None:
    answer = ask(server, "/v1/rerank", query="which", documents=["one", "two", "six"])
    assert [each["index"] for each in answer["results"]] == [0, 1, 2]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_scores_of_pairs(server: RunningServer, path: str) -> None:
    for first, second, pairs in (
        ("which", DOCUMENTS, [("which", document) for document in DOCUMENTS]),
        (DOCUMENTS, "which", [(document, "which") for document in DOCUMENTS]),
        (DOCUMENTS, DOCUMENTS, [*zip(DOCUMENTS, DOCUMENTS, strict=True)]),
        ("which", "one", [("which", "one")]),
        (["which"], ["one"], [("which", "one")]),
    ):
        answer = ask(server, path, text_1=first, text_2=second)
        assert [each["score"] for each in answer["data"]] == [num_tokens(*pair) for pair in pairs]
        assert [each["index"] for each in answer["data"]] == [*range(len(pairs))]
        assert (answer["object"], answer["data"][0]["object"]) == ("list", "score")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b", "word " * 600]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 3]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0].text"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/rerank", {"documents": ["b"]}, "query"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", "word " * 600]}, "text_2[1]"),
        ("/v1/score", {"text_1": ["b", "word " * 600], "text_2": "a"}, "text_1[1]"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
    ],
)
def test_what_cannot_be(server: RunningServer, path: str, body: dict[str, object], param: str) -> None:
    response = server.post(path, body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert not server.engine.encoded


def test_a_classifier_scores_no_pairs(server: RunningServer) -> None:
    server.entry.loaded_engine = StubEngine(runner_info(row_size=3), lambda request, choice: [])
    response = server.post("/v1/score", {"text_1": "a", "text_2": "b"})
    assert (response.status_code, error_of(response)["param"]) == (400, "model")
    assert "3 classes" in error_of(response)["message"]


def test_long_documents_are_cut_where_that_is_asked_for(server: RunningServer) -> None:
    answer = ask(server, "/v1/rerank", query="which", documents=["word " * 600, "b"], truncate_prompt_tokens=-1)
    assert max(each["relevance_score"] for each in answer["results"]) == 512
