"""Reading text that comes in pieces: every method, whole and cut, and that its work grows with the text alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest

from lmserve.service.parsing.events import control
from lmserve.service.parsing.family import ParserInput
from lmserve.service.parsing.reader import Malformed, Reader, Stops
from tests.service.parsing.replay import BY_NAME, fold, replay, tool

Read = Callable[[Reader, list[str]], Generator[None, None, Any]]


def drive(read: Read, pieces: Iterable[str]) -> tuple[Any, str, str]:
    """What is returned, what was passed on, and what is left."""
    reader, passed = Reader(), list[str]()
    rest: list[str] = []
    steps = read(reader, passed)
    waiting = list(pieces)[::-1]
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            reader.push("".join(waiting[::-1]))
            reader.end()
            list(reader.text_until(Stops(()), lambda _, text: rest.append(text)))
            return stop.value, "".join(passed), "".join(rest)
        if waiting:
            reader.push(waiting.pop())
        else:
            reader.end()


def both(read: Read, text: str) -> tuple[Any, str, str]:
    whole = drive(read, [text])
    assert drive(read, list(text)) == whole
    return whole


def until(*markers: str) -> Read:
    return lambda reader, passed: reader.text_until(Stops(markers), lambda _, text: passed.append(text))


@pytest.mark.parametrize(
    ("markers", "text", "expected"),
    [
        (("<a>",), "x<b<a>y", ("<a>", "x<b", "<a>y")),
        (("<a>",), "x<a", (None, "x<a", "")),
        (("abcX", "bc"), "abcX", ("abcX", "", "abcX")),
        (("abcX", "bc"), "abcd", ("bc", "a", "bcd")),
        (("ab", "abc"), "-abc", ("abc", "-", "abc")),
        (("ab", "abc"), "-ab", ("ab", "-", "ab")),
        ((control("a"),), f"x{control('b')}y<a>{control('a')}z", (control("a"), "xy<a>", "z")),
        ((), f"x{control('b')}y", (None, "xy", "")),
    ],
)
def test_text_up_to_a_marker(markers: tuple[str, ...], text: str, expected: tuple[str | None, str, str]) -> None:
    assert both(until(*markers), text) == expected


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ('{"a": "}\\"", "b": [{}]} x', '{"a": "}\\"", "b": [{}]}', " x"),
        ('"a\\\\" x', '"a\\\\"', " x"),
        ("-1.5e3, x", "-1.5e3", ", x"),
        ("true}", "true", "}"),
    ],
)
def test_a_json_value(text: str, value: str, rest: str) -> None:
    def read(reader: Reader, passed: list[str]) -> Generator[None, None, None]:
        return reader.json_value(lambda _, part: passed.append(part))

    assert both(read, text) == (None, value, rest)


@pytest.mark.parametrize("text", ["", "}", "{]", '{"a', "[", '"a\\', f'"a{control("x")}"', f"[{control('x')}]"])
def test_what_is_no_json_value(text: str) -> None:
    for pieces in ([text], list(text)):
        with pytest.raises(Malformed):
            drive(lambda reader, passed: reader.json_value(lambda _, part: passed.append(part)), pieces)


@pytest.mark.parametrize(
    ("text", "cut_off", "found"),
    [("ab", False, "ab"), ("abc", False, "abc"), ("abx", False, "ab"), ("a", False, None), ("a", True, "a")],
)
def test_one_of_several_texts(text: str, cut_off: bool, found: str | None) -> None:
    assert both(lambda reader, _: reader.accept("ab", "abc", cut_off=cut_off), text)[0] == found


class CountingReader(Reader):
    """Counts the characters that the reader has before it each time that it gets more."""

    seen = 0

    def push(self, text: str) -> None:
        super().push(text)
        CountingReader.seen += len(self._buffer)


LONG = 3000
ENDLESS = {
    "text": "word " * (LONG // 5),
    "half-markers": "<tool_" * (LONG // 6),
    "blanks": "\n" * LONG,
    "reasoning": "<think>" + "hm " * (LONG // 3),
    "arguments": '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * LONG,
    "arguments-first": '<tool_call>{"arguments": {"a": "' + '\\"' * (LONG // 3),
    "brackets": '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * LONG,
    "name": '<tool_call>{"name": "' + "f" * LONG,
    "space": "<tool_call>" + " " * LONG,
    "controls": control("<|x|>") * (LONG // 7),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_is_looked_at_does_not_grow_with_what_has_come(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One character at a time: what is before the reader then is what it has not read, however much it holds back."""
    monkeypatch.setattr("lmserve.service.parsing.turn.Reader", CountingReader)
    monkeypatch.setattr(CountingReader, "seen", 0)
    text = ENDLESS[name]
    replay(BY_NAME["hermes"], ParserInput("", [tool("f", {})], lambda _: False), text)
    longest_marker = 40
    assert CountingReader.seen <= len(text) * longest_marker


def test_a_text_in_one_piece_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that are begun after one another begin where the last one ended."""
    stops = Stops(["<a>"])
    spans: list[int] = []

    class Pattern:
        def search(self, text: str, at: int) -> re.Match[str] | None:
            found = re.compile("<a>|" + control("[^\ufdd1]*")).search(text, at)
            spans.append((found.end() if found else len(text)) - at)
            return found

    monkeypatch.setattr(stops, "pattern", Pattern())
    text = ("x" * 9 + control("b")) * 500
    assert (
        drive(lambda reader, passed: reader.text_until(stops, lambda _, part: passed.append(part)), [text])[0] is None
    )
    assert sum(spans) <= 2 * len(text)


def test_many_calls_in_one_piece() -> None:
    block = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
    folded = fold(replay(BY_NAME["hermes"], ParserInput("", [tool("f", {})], lambda _: False), [block * 200]))
    assert folded.calls == [("f", "{}")] * 200
    assert folded.content is None
