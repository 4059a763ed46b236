"""What is refused before a request waits in any queue, and in which words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from lmserve.errors import InvalidRequest
from lmserve.grammar import proof
from lmserve.grammar.build import Body, ChoiceBody, JsonBody, LarkBody, RegexBody, body_text
from lmserve.grammar.proof import GrammarProver


@pytest.fixture
def prover() -> Iterator[GrammarProver]:
    made = GrammarProver()
    yield made
    made.close()


@pytest.mark.parametrize("body", [JsonBody({}), RegexBody("a+"), ChoiceBody(["a"]), LarkBody("start: /./")])
def test_what_can_be_enforced_passes(prover: GrammarProver, body: Body) -> None:
    asyncio.run(prover.prove(body_text(body), "field"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (RegexBody("(?=a)b"), "look-around"),
        (RegexBody("[a-z"), "unclosed character class"),
        (LarkBody("start: foo"), 'unknown name: "foo"'),
        (LarkBody("x: /a/"), "no start rule"),
        (LarkBody('start: %json {"type": "nothing"}'), "Invalid type: nothing"),
        (JsonBody({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (JsonBody({"$ref": "#"}), "no text at all"),
    ],
    ids=str,
)
def test_what_cannot_is_refused_by_its_field_each_time(prover: GrammarProver, body: Body, words: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(prover.prove(body_text(body), "a.field"))
        assert caught.value.param == "a.field"
        assert "a.field cannot be enforced" in str(caught.value)
        assert words in str(caught.value)
        assert "<state>" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_size_is_bounded(prover: GrammarProver) -> None:
    with pytest.raises(InvalidRequest, match=f"the limit is {proof.MAX_GRAMMAR_BYTES}"):
        asyncio.run(prover.prove(body_text(LarkBody("x" * proof.MAX_GRAMMAR_BYTES)), "field"))


def test_so_is_the_time(prover: GrammarProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that takes long is given up; what others ask meanwhile is answered."""
    slow = body_text(JsonBody({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}))
    quick = body_text(JsonBody({"type": "integer"}))
    monkeypatch.setattr(proof, "COMPILE_SECONDS", 0.0)
    with pytest.raises(InvalidRequest, match="not compiled within 0 seconds"):
        asyncio.run(prover.prove(slow, "field"))
    monkeypatch.undo()
    asyncio.run(prover.prove(quick, "field"))
    asyncio.run(prover.prove(slow, "field"))


def test_a_few_are_remembered(prover: GrammarProver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "REMEMBERED", 2)
    calls: list[str] = []
    real = proof.problem

    def counted(tokenizer: object, grammar: str) -> str | None:
        calls.append(grammar)
        return real(tokenizer, grammar)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "problem", counted)
    texts = [body_text(ChoiceBody([name])) for name in "abc"]
    for text in (*texts, texts[2], texts[1], texts[0]):
        asyncio.run(prover.prove(text, "field"))
    assert calls == [*texts, texts[0]]
