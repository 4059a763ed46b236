"""Texts that read like English and stay the same: what was measured last year can be measured again."""

from __future__ import annotations

import random

LONGEST_WORDS = 190
"""With their punctuation some 220 tokens of BERT's, of the 256 that all-MiniLM-L6-v2 takes."""

SUBJECTS = (
    *("the committee", "a young engineer", "our neighbour", "the old lighthouse", "every second visitor"),
    *("the library", "a retired teacher", "the night train", "the research group", "her brother"),
    *("the small bakery", "the new version", "the municipal archive", "a flock of geese", "the customer"),
    *("nobody in the village", "the service", "the author"),
)
VERBS = (
    *("described", "repaired", "ignored", "compared", "published", "returned", "could not explain"),
    *("carefully measured", "had forgotten", "finally replaced", "questioned", "photographed", "rarely mentions"),
    *("is going to translate"),
)
OBJECTS = (
    *("the broken window", "an unfinished report", "three invoices", "the temperature of the river"),
    *("a wooden bridge", "the database", "an early manuscript", "the causes of the delay", "their winter schedule"),
    *("a box of instruments", "the recommendation", "twelve samples of soil", "the password", "a faster algorithm"),
    *("the price of bread"),
)
CIRCUMSTANCES = (
    *("before the harbour froze", "in the second week of March", "without asking anyone", "for the third time"),
    *("although the evidence was thin", "near the railway station", "according to the minutes"),
    *("at half past seven", "because the contract required it", "in a letter from Lisbon"),
    *("while the children were asleep", "last year"),
)
LINKS = ("and", "but", "so", "while", "which is why", "even though")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """``count`` texts of one word to ``LONGEST_WORDS``; most are short, some are long. The same for the same seed."""
    draw = random.Random(seed)
    return [make_text(min(LONGEST_WORDS, 1 + int(draw.lognormvariate(3.2, 0.9))), draw) for _ in range(count)]


def make_text(num_words: int, draw: random.Random) -> str:
    """Sentences, the last one cut to the number of words."""
    words: list[str] = []
    while len(words) < num_words:
        words += _sentence(draw).split()
    return " ".join(words[:num_words])


def _sentence(draw: random.Random) -> str:
    text = _clause(draw)
    if draw.random() < 0.4:
        text += f", {draw.choice(LINKS)} {_clause(draw)}"
    return f"{text[0].upper()}{text[1:]}{draw.choice('....?')}"


def _clause(draw: random.Random) -> str:
    clause = f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}"
    return f"{clause} {draw.choice(CIRCUMSTANCES)}" if draw.random() < 0.6 else clause
