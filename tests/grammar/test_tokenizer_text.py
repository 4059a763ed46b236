"""What llguidance is told of a tokenizer: control tokens have names that no text has."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from lmserve.grammar.build import ChoiceBody, JsonBody, ReasoningFirst, RegexBody, Structure, body_text, grammar_text
from lmserve.grammar.tokenizer_text import TokenizerText, looks_like_control
from lmserve.grammar.vocabulary import byte_tokenizer, read_tokenizer
from lmserve.service.model_text import ModelText
from tests.service import tokenizers_for_tests as made


def walk(tokenizer: LLTokenizer, grammar: str, seed: int) -> list[int]:
    """Tokens of one output, drawn from those that are allowed."""
    matcher, rng = LLMatcher(tokenizer, grammar, log_level=0), random.Random(seed)
    token_ids: list[int] = []
    while len(token_ids) < 200:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        assert not matcher.is_error(), matcher.get_error()
        token_id = rng.choice(np.unpackbits(mask, bitorder="little").nonzero()[0].tolist())
        if token_id in tokenizer.eos_tokens:
            return token_ids
        assert matcher.consume_token(token_id), matcher.get_error()
        token_ids.append(token_id)
    raise AssertionError("the output has no end")


@pytest.mark.parametrize("seed", range(10))
def test_text_that_spells_a_control_token_is_written_in_ordinary_tokens(seed: int) -> None:
    model = made.smollm2()
    tokenizer = read_tokenizer(model.for_grammars(), 49152)
    text = "a <|im_start|> b <|endoftext|>"
    token_ids = walk(tokenizer, body_text(ChoiceBody([text])), seed)
    assert model.decode(token_ids, skip_special_tokens=False) == text
    assert not set(token_ids) & model.table.special_ids


def test_a_grammar_asks_for_a_control_token_by_its_id() -> None:
    model = made.smollm2()
    tokenizer = read_tokenizer(model.for_grammars(), 49152)
    control_ids = model.control_ids
    begin = control_ids["<|im_start|>"]
    assert "<|im_end|>" in control_ids
    reasoning = ReasoningFirst("<|im_start|>", "<file_sep>", "possible")
    grammar = grammar_text(Structure([RegexBody("[ab]{3}")], reasoning), control_ids)
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    thoughts = [begin, *model.encode_tokens("Whatever 1 < 2"), control_ids["<file_sep>"]]
    token_ids = [*thoughts, *model.encode_tokens("aba")]
    assert matcher.validate_tokens(token_ids) == len(token_ids)
    assert matcher.validate_tokens(model.encode_tokens("aba")) == len(model.encode_tokens("aba")), "or at once"
    assert matcher.validate_tokens(model.encode_tokens("<|im")) == 0, "nothing else"


@pytest.mark.parametrize(
    "make", [lambda: made.sentencepiece(strip=True), lambda: made.sentencepiece(strip=False), made.byte_level]
)
def test_tokenizers_whose_tokens_are_bytes_can_write_anything(make: Any) -> None:
    model = ModelText(make(), eos_token_ids=[0])
    tokenizer = read_tokenizer(model.for_grammars(), len(model.table.pieces))
    text = '{"h\u00e9llo": "\u65e5\u672c"}'
    for seed in range(3):
        token_ids = walk(tokenizer, body_text(ChoiceBody([text])), seed)
        assert b"".join(map(model.table.piece, token_ids)).decode() == text


@pytest.mark.parametrize("make", [made.unigram, made.wordpiece])
def test_others_are_refused_before_the_queue(make: Any) -> None:
    with pytest.raises(Exception, match="tokens are not bytes"):
        ModelText(make(), eos_token_ids=[0]).for_grammars()


def test_a_model_without_an_end_is_refused() -> None:
    tokenizer = made.byte_level()
    tokenizer.eos_token = None
    with pytest.raises(Exception, match="no end-of-sequence token"):
        ModelText(tokenizer).for_grammars()


def test_ids_count_from_the_highest() -> None:
    text = made.smollm2().for_grammars()
    assert text.num_ids == 49152
    assert read_tokenizer(text, 49160).vocab_size == 49160, "padding ids of the logits"
    assert read_tokenizer(text, 100).vocab_size == 49152, "more tokens than logits"


@pytest.mark.parametrize(
    ("name", "special", "expected"),
    [("<think>", False, True), ("[INST]", True, True), ("[INST]", False, False), ("foo", False, False)],
)
def test_what_counts_as_a_control_token(name: str, special: bool, expected: bool) -> None:
    assert looks_like_control(name, special=special) is expected


def test_the_byte_tokenizer_writes_every_byte_once() -> None:
    tokenizer = byte_tokenizer()
    matcher = LLMatcher(tokenizer, body_text(JsonBody({"const": "\u00e9\U0001f600"})), log_level=0)
    for byte in '"\u00e9\U0001f600"'.encode():
        assert matcher.consume_token(byte)
    assert matcher.is_accepting()


def test_lists_of_pairs_are_renamed_too() -> None:
    """As unigram tokenizers have their vocabulary."""
    state = made.unigram().backend_tokenizer.to_str()
    text = TokenizerText.of(state, [0])
    assert "<unk>" not in text.json or '"content":"<unk>"' not in text.json
