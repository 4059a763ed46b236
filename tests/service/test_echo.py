from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.outputs import TokenLogprobs
from lmserve.service.chat_template import Prompt
from lmserve.service.deltas import TokenLogprob
from lmserve.service.echo import Echo, EchoLogprobs, echo_prompt
from lmserve.service.model_text import ModelText
from tests.service import tokenizers_for_tests as made

BYTE_LEVEL = ModelText(made.byte_level())
LLAMA = ModelText(made.sentencepiece(strip=True))
GEMMA = ModelText(made.sentencepiece(strip=False))
UNIGRAM = ModelText(made.unigram())
WORDPIECE = ModelText(made.wordpiece())
BOS = BYTE_LEVEL.tokenizer.bos_token_id


def echo_of(text: str, model: ModelText, *added: int) -> tuple[Echo, list[int]]:
    """The echo of a text prompt that the tokenizer put ``added`` before, and its token ids."""
    token_ids = [*added, *model.encode_rendered(text)]
    return echo_prompt(Prompt(text, token_ids), model), token_ids


def named_pieces(echo: Echo) -> list[str]:
    """The text from each token's offset to the next one's."""
    ends = [*echo.text_offsets[1:], len(echo.text)]
    return [echo.text[start:end] for start, end in zip(echo.text_offsets, ends, strict=True)]


def test_each_token_begins_where_its_bytes_begin() -> None:
    echo, token_ids = echo_of("hello world", BYTE_LEVEL)
    assert echo.text == "hello world"
    assert named_pieces(echo) == ["hell", "o", " w", "o", "r", "l", "d"]
    assert len(token_ids) == 7


def test_the_bytes_of_one_character_begin_together() -> None:
    echo, token_ids = echo_of("a\u00e9\U0001f600b", BYTE_LEVEL)
    assert [BYTE_LEVEL.table.piece(i) for i in token_ids[1:3]] == [b"\xc3", b"\xa9"]
    assert echo.text_offsets == (0, 1, 1, 2, 2, 2, 2, 3)


def test_a_token_that_the_tokenizer_added_has_no_text() -> None:
    echo, _ = echo_of("hello", BYTE_LEVEL, BOS)
    assert (echo.text, echo.text_offsets) == ("hello", (0, 0, 4))


def test_a_control_token_that_the_client_wrote_has_its_name() -> None:
    echo, token_ids = echo_of("<s>he</s>o", BYTE_LEVEL, BOS)
    assert token_ids[:2] == [BOS, BOS]
    assert echo.text == "<s>he</s>o"
    assert echo.text_offsets == (0, 3, 3, 5, 9), "the first one stands for the client's"


@pytest.mark.parametrize("model", [LLAMA, UNIGRAM])
def test_the_space_before_the_first_word_is_the_tokenizers(model: ModelText) -> None:
    bos = model.tokenizer.bos_token_id
    echo, token_ids = echo_of("hello he", model, bos)
    assert model.table.piece(token_ids[1]).startswith(b" he")
    assert echo.text == "hello he"
    assert (echo.text_offsets[:3], echo.text_offsets[-1]) == ((0, 0, 2), 5)


def test_a_tokenizer_that_looks_at_neighbours() -> None:
    echo, _ = echo_of("hello worldly", WORDPIECE)
    assert (echo.text, named_pieces(echo)) == ("hello worldly", ["hello", " world", "ly"])


def test_offsets_are_the_texts_where_its_decoding_has_more_spaces() -> None:
    echo, _ = echo_of("hello, worlds", WORDPIECE)
    assert named_pieces(echo) == ["hello", ",", " world", "s"]


def test_offsets_stay_in_a_text_that_the_tokenizer_changed() -> None:
    echo, token_ids = echo_of("x y world", WORDPIECE)
    assert WORDPIECE.decode(token_ids) == "[UNK] [UNK] world"
    assert (echo.text, echo.text_offsets) == ("x y world", (0, 5, 9))


@pytest.mark.parametrize("model", [BYTE_LEVEL, LLAMA, GEMMA])
@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_comes_back_as_it_was(model: ModelText, text: str) -> None:
    token_ids = model.encode(text)
    if not token_ids:
        return
    echo = echo_prompt(Prompt(text, token_ids), model)
    assert echo.text == text
    assert len(echo.text_offsets) == len(token_ids)
    assert list(echo.text_offsets) == sorted(echo.text_offsets)
    assert 0 <= echo.text_offsets[0] <= echo.text_offsets[-1] <= len(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1))
def test_offsets_are_counted_in_characters(text: str) -> None:
    echo, token_ids = echo_of(text, BYTE_LEVEL)
    num_bytes = 0
    for token_id, offset in zip(token_ids, echo.text_offsets, strict=True):
        assert offset == len(text.encode()[:num_bytes].decode("utf-8", "ignore"))
        num_bytes += len(BYTE_LEVEL.table.piece(token_id))


@pytest.mark.parametrize("model", [BYTE_LEVEL, LLAMA, GEMMA, UNIGRAM])
@pytest.mark.parametrize("text", ["hello", "he hello", " h"])
@pytest.mark.parametrize("with_bos", [True, False])
def test_token_ids_are_decoded_with_control_tokens(model: ModelText, text: str, with_bos: bool) -> None:
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    token_ids = [*([bos] if with_bos else []), *model.encode_rendered(text), eos]
    echo = echo_prompt(Prompt(None, token_ids), model)
    assert echo.text == model.decode(token_ids, skip_special_tokens=False)
    assert named_pieces(echo)[-1] == "</s>"
    if with_bos:
        assert named_pieces(echo)[0] == "<s>"


def test_half_a_character_at_the_end_of_token_ids_has_no_text() -> None:
    token_ids = BYTE_LEVEL.encode_rendered("h\u00e9")[:2]
    assert echo_prompt(Prompt(None, token_ids), BYTE_LEVEL) == Echo("h", (0, 1))


def entries(*logprobs: float) -> Sequence[TokenLogprobs]:
    return [TokenLogprobs(logprob, ((5, logprob), (6, -9.0))) for logprob in logprobs]


def test_logprobs_come_in_pieces() -> None:
    echo, token_ids = echo_of("hello", BYTE_LEVEL, BOS)
    logprobs = EchoLogprobs(echo, token_ids, BYTE_LEVEL.table)
    states = [logprobs.is_complete]
    for logprob in (-1.0, -2.0):
        logprobs.push(entries(logprob))
        states.append(logprobs.is_complete)
    assert states == [False, False, True]
    first, second, third = logprobs.positions
    assert (first.sampled.text, first.is_unpredicted, first.top, first.text_offset) == ("<s>", True, (), 0)
    assert (second.sampled.text, second.sampled.logprob, second.text_offset) == ("hell", -1.0, 0)
    assert (third.sampled.text, third.sampled.logprob, third.text_offset) == ("o", -2.0, 4)
    assert not second.is_unpredicted
    piece = BYTE_LEVEL.table.piece
    assert third.top == (TokenLogprob(5, piece(5), -2.0), TokenLogprob(6, piece(6), -9.0))


def test_one_token_waits_for_nothing() -> None:
    echo, token_ids = echo_of("h", BYTE_LEVEL)
    assert EchoLogprobs(echo, token_ids, BYTE_LEVEL.table).is_complete
