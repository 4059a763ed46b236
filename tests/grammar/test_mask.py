"""The worker's half, slot by slot."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from lmserve.grammar.build import ChoiceBody, JsonBody, body_text
from lmserve.grammar.mask import GrammarError, GrammarMasks
from tests.service import tokenizers_for_tests as made

VOCAB = 49152 + 8
"""Padding ids behind the tokenizer's."""
YES = body_text(ChoiceBody(["yes", "yellow"]))


@pytest.fixture
def masks() -> GrammarMasks:
    found = GrammarMasks(max_num_seqs=4, vocab_size=VOCAB)
    found.use_vocabulary(made.smollm2().for_grammars())
    return found


def allowed(masks: GrammarMasks, slots: list[int]) -> list[list[int]] | None:
    if not masks.start(slots):
        assert masks.wait() is None
        return None
    found = masks.wait()
    assert found is not None
    assert found.shape == (len(slots), -(-VOCAB // 32))
    bits = np.unpackbits(np.ascontiguousarray(found).view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]
    return [row.nonzero()[0].tolist() for row in bits]


def texts(token_ids: list[int]) -> set[str]:
    return {made.smollm2().decode([token_id], skip_special_tokens=False) for token_id in token_ids}


def test_each_row_has_its_own(masks: GrammarMasks) -> None:
    masks.begin(0, YES, [])
    masks.begin(2, body_text(JsonBody({"type": "boolean"})), [])
    rows = allowed(masks, [2, 1, 0])
    assert rows is not None
    assert texts(rows[0]) <= {"t", "tr", "true", "f", "fa", "fal", "false", "tru", "fals"}
    assert len(rows[1]) == VOCAB, "no grammar: everything"
    assert texts(rows[2]) == {"y", "ye", "yes", "yellow", "yell"} & texts(rows[2])


def test_nothing_is_made_where_nobody_asks(masks: GrammarMasks) -> None:
    masks.begin(0, YES, [])
    assert allowed(masks, [1, 3]) is None
    masks.begin(0, "", [])
    assert allowed(masks, [0]) is None


def test_tokens_are_followed_to_the_end(masks: GrammarMasks) -> None:
    model = made.smollm2()
    masks.begin(1, YES, [])
    for token_id in model.encode_tokens("yes"):
        masks.accept(1, token_id)
    assert allowed(masks, [1]) == [[*model.eos_token_ids]]


def test_a_sequence_that_comes_back_is_where_it_was(masks: GrammarMasks) -> None:
    model = made.smollm2()
    grammar = body_text(JsonBody({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}))
    output = model.encode_tokens('{"n": 12')
    masks.begin(0, grammar, [])
    for token_id in output:
        masks.accept(0, token_id)
    masks.begin(3, grammar, output)
    rows = allowed(masks, [0, 3])
    assert rows is not None
    assert rows[0] == rows[1]


def test_copies_do_not_know_of_each_other(masks: GrammarMasks) -> None:
    masks.begin(0, YES, [])
    masks.begin(1, YES, [])
    before = allowed(masks, [1])
    masks.accept(0, made.smollm2().encode_tokens("y")[0])
    assert allowed(masks, [1]) == before


def test_what_cannot_be_compiled_or_was_never_allowed_is_an_error(masks: GrammarMasks) -> None:
    with pytest.raises(GrammarError):
        masks.begin(0, "start: nothing", [])
    with pytest.raises(GrammarError, match="does not allow the output"):
        masks.begin(0, YES, made.smollm2().encode_tokens("no"))
    assert allowed(masks, [0]) is None


def test_a_matcher_that_failed_allows_nothing(masks: GrammarMasks, caplog: pytest.LogCaptureFixture) -> None:
    masks.begin(0, YES, [])
    with caplog.at_level(logging.ERROR):
        masks.accept(0, made.smollm2().encode_tokens("no")[0])
        assert allowed(masks, [0]) == [[]]
    assert "does not allow token" in caplog.text


def test_a_failed_draw_is_no_token(masks: GrammarMasks) -> None:
    masks.begin(0, YES, [])
    before = allowed(masks, [0])
    masks.accept(0, -1)
    assert allowed(masks, [0]) == before


def test_few_grammars_are_kept(masks: GrammarMasks) -> None:
    for i in range(100):
        masks.begin(0, body_text(ChoiceBody([f"t{i}"])), [])
    masks.begin(0, YES, [])
    assert allowed(masks, [0]) is not None
