"""The person at the terminal: messages and questions (standard error), and text that must not drive the terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They change in which order text is shown that stands elsewhere."""


def visible(text: str) -> str:
    """The text with control characters written out, but for line feeds and tabs."""
    if text.isprintable():  # nearly all of it
        return text
    return "".join(_shown(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return (unicodedata.category(character) == "Cc" and character not in "\n\t") or character in _BIDI_CONTROLS


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: str = "") -> None:
    """A message for people: on standard error, so that standard output holds results only."""
    print(visible(text), file=sys.stderr, flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """A program that was started without such a stream has None there."""
    return stream is not None and stream.isatty()


def can_ask() -> bool:
    """Whether there is somebody who sees a question and can answer it."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def choose(question: str, choices: Sequence[str]) -> str:
    """The choice that the person makes, by number or by name. Asks until there is an answer.

    Raises:
        KeyboardInterrupt: the person leaves, with Ctrl-C or Ctrl-D.
    """
    say(question)
    for number, choice in enumerate(choices, 1):
        say(f"  {number}. {choice}")
    while True:
        answer = _ask(f"Number (1-{len(choices)}): ")
        if answer in choices:
            return answer
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return choices[int(answer) - 1]


def confirm(question: str) -> bool:
    """Yes or no; no unless the answer is yes."""
    return _ask(f"{question} [y/N] ").lower() in ("y", "yes")


def _ask(prompt: str) -> str:
    try:
        print(visible(prompt), end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        say()  # what follows has a line of its own
        raise KeyboardInterrupt
    return line.strip()
