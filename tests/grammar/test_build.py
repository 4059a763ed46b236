"""Grammars as text: what each body lets through, and what may stand around it."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher

from lmserve.grammar.build import (
    MAX_CALLS,
    Body,
    Call,
    CallsBody,
    ChoiceBody,
    JsonBody,
    LarkBody,
    ReasoningFirst,
    RegexBody,
    Structure,
    body_text,
    grammar_text,
)
from tests.grammar.byte_matcher import TOKENIZER, accepts

INTEGER = {"type": "integer"}
CALLS = CallsBody(
    [
        Call("<f>", {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": False}, "</f>"),
        Call("<g>", INTEGER, "</g>"),
    ],
    "[",
    ", ",
    "]",
    repeats=True,
)


def matcher(grammar: str) -> LLMatcher:
    made = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        (JsonBody({}), ["1", '{"a": [null]}', '"x"'], ["", "{", "a", "1 2", " 1"]),
        (JsonBody({"type": "object"}), ["{}", '{"a": 1}'], ["[]", "1"]),
        (RegexBody("a/b[0-9]+"), ["a/b1", "a/b234"], ["a/b", "xa/b1", "a/b1x"]),
        (
            ChoiceBody(["yes", "yes, sir", '"quoted"', "\u65e5\\"]),
            ["yes", "yes, sir", '"quoted"', "\u65e5\\"],
            ["", "ye", "no"],
        ),
        (LarkBody('start: "a" b\nb: "c" | "d" b'), ["ac", "addc"], ["a", "ad", "acc"]),
        (
            CALLS,
            ['[<f>{"a": 1}</f>]', "[<g>5</g>, <f>{}</f>]"],
            ["[]", "[<f>1</f>]", "<g>5</g>", "[<g>5</g> <g>5</g>]"],
        ),
    ],
    ids=["any JSON", "object", "regex", "choice", "lark", "calls"],
)
def test_bodies(body: Body, good: list[str], bad: list[str]) -> None:
    made = matcher(body_text(body))
    assert [text for text in good if not accepts(made, text)] == []
    assert [text for text in bad if accepts(made, text)] == []


def test_calls_are_bounded_and_may_be_one() -> None:
    many = matcher(body_text(CALLS))
    assert accepts(many, "[" + ", ".join(["<g>1</g>"] * MAX_CALLS) + "]")
    assert not accepts(many, "[" + ", ".join(["<g>1</g>"] * (MAX_CALLS + 1)) + "]")
    one = matcher(body_text(CallsBody(CALLS.calls, "", "\n", "", repeats=False)))
    assert accepts(one, "<g>1</g>")
    assert not accepts(one, "<g>1</g>\n<g>2</g>")


def test_blanks_are_free_and_bounded() -> None:
    made = matcher(body_text(JsonBody({"type": "array", "items": INTEGER})))
    assert accepts(made, "[1,2]")
    assert accepts(made, "[\n\t1 ,   2 ]")
    assert not accepts(made, "[" + " " * 9 + "1]")
    assert not accepts(made, "[1] ")


def test_a_property_cannot_be_spelled_in_another_way() -> None:
    made = matcher(body_text(JsonBody({"type": "object", "properties": {"a": INTEGER}})))
    assert accepts(made, '{"a": 1}')
    assert not accepts(made, json.dumps({"a": "x"}))
    assert not accepts(made, '{"\\u0061": "x"}')


def test_one_of_several_bodies() -> None:
    made = matcher(grammar_text(Structure([CALLS, JsonBody(INTEGER)]), {}))
    assert accepts(made, "[<g>1</g>]")
    assert accepts(made, "7")
    assert not accepts(made, "7[<g>1</g>]")


@pytest.mark.parametrize("end", ["</think>", "Here is my answer:"])
def test_reasoning_first(end: str) -> None:
    """Its markers are plain text here, which the first of them ends."""
    begun = matcher(grammar_text(Structure([JsonBody(INTEGER)], ReasoningFirst("<think>", end, "begun")), {}))
    assert accepts(begun, f"Let me <think>\n{end}\n\n5")
    assert accepts(begun, f"{end}5")
    assert not accepts(begun, "5")
    assert not accepts(begun, f"{end}x{end}5")
    possible = matcher(grammar_text(Structure([JsonBody(INTEGER)], ReasoningFirst("<think>", end, "possible")), {}))
    assert accepts(possible, "5")
    assert accepts(possible, f"<think>hm{end}\n5")
    assert not accepts(possible, f"hm{end}\n5")


def test_what_has_to_come_before_a_body() -> None:
    made = matcher(grammar_text(Structure([CALLS, JsonBody(INTEGER)], None, ["", "final: "]), {}))
    assert accepts(made, "final: 5")
    assert accepts(made, "[<g>1</g>]")
    assert not accepts(made, "5")
    assert not accepts(made, "final: [<g>1</g>]")


def test_control_tokens_stand_by_their_ids() -> None:
    text = grammar_text(
        Structure([CallsBody([Call("<f>", INTEGER, "")], "<|x|>", "", "", repeats=False)]), {"<|x|>": 17}
    )
    assert "<[17]>" in text
    assert "<|x|>" not in text
