from __future__ import annotations

import pytest

from lmserve.cli.terminal import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode, 漢字, 👩\u200d🚀", "plain, ünïcode, 漢字, 👩\u200d🚀"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\b", "over\\x0dwritten\\x08"),
        ("\x7f\x9b2J\x00", "\\x7f\\x9b2J\\x00"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("\u00a0\u2028", "\u00a0\u2028"),
    ],
)
def test_only_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
