from __future__ import annotations

from typing import Any

import pytest

from lmserve.service.token_table import build_token_table
from tests.service import tokenizers_for_tests as made


@pytest.mark.parametrize(
    "tokenizer", [made.byte_level(), made.sentencepiece(strip=True), made.sentencepiece(strip=False)]
)
@pytest.mark.parametrize("text", ["hello world", "h\u00e9llo \u20ac \U0001f600", "two  spaces", "a\nb"])
def test_the_pieces_of_a_text_are_the_text(tokenizer: Any, text: str) -> None:
    table = build_token_table(tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(map(table.piece, token_ids)).decode()
    assert table.concatenates
    assert joined.removeprefix(" " if table.drops_first_space else "") == text


def test_which_tokenizers_drop_the_first_space() -> None:
    assert build_token_table(made.sentencepiece(strip=True)).drops_first_space
    assert build_token_table(made.unigram()).drops_first_space
    assert not build_token_table(made.sentencepiece(strip=False)).drops_first_space
    assert not build_token_table(made.byte_level()).drops_first_space


def test_a_byte_token_is_its_byte() -> None:
    tokenizer = made.sentencepiece(strip=True)
    assert build_token_table(tokenizer).piece(tokenizer.convert_tokens_to_ids("<0xE2>")) == b"\xe2"


def test_special_tokens_have_a_name_and_ordinary_added_tokens_are_text() -> None:
    tokenizer = made.byte_level()
    table = build_token_table(tokenizer)
    assert table.special_ids == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert table.piece(tokenizer.eos_token_id) == b"</s>"
    assert table.piece(tokenizer.convert_tokens_to_ids("<think>")) == b"<think>"


def test_ids_beyond_the_tokenizer_are_empty() -> None:
    table = build_token_table(made.byte_level())
    assert table.piece(10**6) == b""


def test_a_decoder_that_looks_at_neighbours_does_not_concatenate() -> None:
    tokenizer = made.wordpiece()
    table = build_token_table(tokenizer)
    assert not table.concatenates
    assert table.piece(tokenizer.convert_tokens_to_ids("hello")) == b"hello"


def test_smollm2() -> None:
    text = made.smollm2()
    assert text.table.concatenates
    assert not text.table.drops_first_space
    assert len(text.table.pieces) == 49152
    assert text.table.piece(text.eos_token_ids[-1]) == b"<|im_end|>"
    sample = "Na\u00efve caf\u00e9 \U0001f9d1\u200d\U0001f680 \u4f60\u597d\n\tend"
    assert b"".join(map(text.table.piece, text.encode(sample))).decode() == sample
