from __future__ import annotations

import pytest

from lmserve.service.control_tokens import ControlTokens

TOKENS = ControlTokens(["<s>", "<s>x", "[a.b]"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a <s> b", True),
        ("< s>", False),
        ("[aXb]", False),
        ([{"a": [None, 1, "[a.b]"]}], True),
        ({"a": {"<s>x": 1}}, True),
        ({"a": {"b": [1.5, True, None]}}, False),
    ],
)
def test_texts_and_keys_are_searched_at_every_depth(value: object, expected: bool) -> None:
    assert TOKENS.are_in(value) is expected


def test_keys_are_told_from_values() -> None:
    assert TOKENS.find_key([{"a": "<s>"}, {"b": [{"x<s>": 1}]}]) == "x<s>"
    assert TOKENS.find_key({"a": ["<s>"]}) is None


def test_a_tokenizer_without_any() -> None:
    assert not ControlTokens([]).are_in(["", "x"])
