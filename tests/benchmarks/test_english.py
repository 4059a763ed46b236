from __future__ import annotations

import hashlib
import random

from transformers import AutoTokenizer

from benchmarks.english import LONGEST_WORDS, make_text, make_texts
from lmserve.models.starter import STARTERS, find_source

LONGEST_TOKENS = 256
"""What all-MiniLM-L6-v2 takes."""


def test_the_texts_are_the_same_for_ever() -> None:
    """A change here means that no earlier figure can be compared with a later one: say so in the changelog."""
    digest = hashlib.sha256("\n".join(make_texts(4096)).encode()).hexdigest()
    assert digest[:16] == "6ebaed9bce4412ce"
    assert make_texts(20) == make_texts(4096)[:20]
    assert make_texts(20, seed=1) != make_texts(20)


def test_all_lengths_that_a_small_model_takes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_source(STARTERS["all-minilm-l6-v2"]))
    lengths = [len(ids) for ids in tokenizer(make_texts(4096))["input_ids"]]
    assert min(lengths) <= 6
    assert 200 < max(lengths) <= LONGEST_TOKENS
    assert 35 < sum(lengths) / len(lengths) < 50


def test_a_text_has_as_many_words_as_are_wanted() -> None:
    for num_words in (1, 2, 30, LONGEST_WORDS):
        text = make_text(num_words, random.Random(num_words))
        assert len(text.split()) == num_words
        assert text[0].isupper()
    assert make_text(80, random.Random(0)).count(".") > 3
