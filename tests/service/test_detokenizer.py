from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.service.detokenizer import IncrementalDetokenizer
from lmserve.service.model_text import ModelText
from tests.service import tokenizers_for_tests as made

BYTE_LEVEL = ModelText(made.byte_level())
LLAMA = ModelText(made.sentencepiece(strip=True))
GEMMA = ModelText(made.sentencepiece(strip=False))
UNIGRAM = ModelText(made.unigram())
WORDPIECE = ModelText(made.wordpiece())
REPLACEMENT = "\ufffd"


def pieces(detokenizer: IncrementalDetokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def ids_of(model: ModelText) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(model.table.pieces) - 1), max_size=40)


def check_against_whole_decoding(model: ModelText, token_ids: list[int]) -> None:
    """Equal, but for the U+FFFDs of a character that is incomplete at the very end.

    One, as a rule. Of what begins a surrogate (ED A0, say) Python waits for the third byte, where others see two
    errors.
    """
    whole = model.decode(token_ids)
    data = b"".join(model.table.piece(i) for i in token_ids if i not in model.table.special_ids)
    streamed = "".join(pieces(model.detokenizer(begins_text=True), token_ids))
    dropped = whole.removeprefix(streamed)
    assert streamed + dropped == whole
    assert dropped in ("", REPLACEMENT, 2 * REPLACEMENT)
    assert not (dropped and data.endswith(REPLACEMENT.encode()))


@settings(max_examples=300, deadline=None)
@given(ids_of(BYTE_LEVEL))
def test_byte_level_tokens_in_any_order(token_ids: list[int]) -> None:
    check_against_whole_decoding(BYTE_LEVEL, token_ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40))
def test_smollm2_tokens_in_any_order(token_ids: list[int]) -> None:
    check_against_whole_decoding(made.smollm2(), token_ids)


@pytest.mark.parametrize("model", [LLAMA, GEMMA, UNIGRAM])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_sentencepiece_tokens_in_any_order(model: ModelText, data: st.DataObject) -> None:
    """Byte tokens aside: there the whole decoding gives up good characters, see below."""
    token_ids = [i for i in data.draw(ids_of(model)) if not model.table.piece(i) or i > 255 or model is UNIGRAM]
    check_against_whole_decoding(model, token_ids)


@pytest.mark.parametrize("model", [BYTE_LEVEL, LLAMA, GEMMA])
@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_and_no_character_is_split(model: ModelText, text: str) -> None:
    token_ids = model.encode_rendered(text)
    streamed = pieces(model.detokenizer(begins_text=True), token_ids)
    assert "".join(streamed) == model.decode(token_ids)
    assert all(REPLACEMENT not in piece for piece in streamed if REPLACEMENT not in text)


def test_a_stray_byte_does_not_spoil_its_neighbours() -> None:
    """``tokenizers`` gives four U+FFFD for these four byte tokens, and its incremental decoder an exception."""
    token_ids = [0xE2, 0x82, 0xAC, 0xF0, LLAMA.tokenizer.convert_tokens_to_ids("a")]
    assert LLAMA.decode(token_ids) == REPLACEMENT * 4 + "a"
    assert pieces(LLAMA.detokenizer(begins_text=True), token_ids) == ["", "", "\u20ac", "", REPLACEMENT + "a", ""]


@pytest.mark.parametrize("model", [BYTE_LEVEL, LLAMA])
def test_an_incomplete_character_is_dropped_and_a_meant_replacement_is_not(model: ModelText) -> None:
    cut = model.encode_rendered("a\U0001f600")[:-1]
    assert "".join(pieces(model.detokenizer(begins_text=True), cut)) == "a"
    meant = model.encode_rendered("a" + REPLACEMENT)
    assert "".join(pieces(model.detokenizer(begins_text=True), meant)) == "a" + REPLACEMENT


def test_the_first_space_belongs_to_a_continuation() -> None:
    token_ids = LLAMA.encode_rendered("he he")
    assert "".join(pieces(LLAMA.detokenizer(begins_text=True), token_ids)) == "he he"
    assert "".join(pieces(LLAMA.detokenizer(begins_text=False), token_ids)) == " he he"


def test_special_tokens_have_no_text() -> None:
    eos = BYTE_LEVEL.tokenizer.eos_token_id
    assert pieces(BYTE_LEVEL.detokenizer(begins_text=True), [eos, *BYTE_LEVEL.encode_rendered("hi"), eos])[-3:] == [
        "i",
        "",
        "",
    ]


@settings(max_examples=200, deadline=None)
@given(ids_of(WORDPIECE))
def test_tokens_that_depend_on_their_neighbours(token_ids: list[int]) -> None:
    streamed = pieces(WORDPIECE.detokenizer(begins_text=True), token_ids)
    assert "".join(streamed) == WORDPIECE.decode(token_ids)
