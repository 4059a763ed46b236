from __future__ import annotations

import pytest

from lmserve.cli.conversation import OWN_FIELDS, Answer, Conversation


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("true", True),
        ('"5"', "5"),
        ("END", "END"),
        ('["a", "b"]', ["a", "b"]),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ('"\\ud800"', '"\\ud800"'),
        ("\udcff", "?"),
    ],
)
def test_values_are_json_or_else_text(text: str, value: object) -> None:
    conversation = Conversation("m", settings={"x": 1})
    conversation.set("x", text)
    assert conversation.settings == {"x": value}


@pytest.mark.parametrize("text", ["", "null"])
def test_a_setting_is_taken_back(text: str) -> None:
    conversation = Conversation("m", settings={"x": 1, "y": 2})
    conversation.set("x", text)
    conversation.set("never_set", text)
    assert conversation.settings == {"y": 2}


@pytest.mark.parametrize("name", sorted(OWN_FIELDS))
def test_what_the_chat_itself_says_is_not_the_users_to_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is the chat's own"):
        Conversation("m").set(name, "5")


def test_figures() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 11}
    whole = Answer(finish_reason="stop", usage=usage, first_token_seconds=0.5, seconds=2.5)
    assert whole.figures() == "11 tokens, 5.0 tokens/s, 0.50 s to the first, 7 in the prompt, stop"
    assert Answer().figures() == "0 tokens, 0.00 s to the first, 0 in the prompt, stopped"
