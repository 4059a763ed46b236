from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.service.stop_strings import StopPatterns, StopStrings

TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """On the whole text: up to the stop string that is complete first, the longest of those."""
    found = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    if not found:
        return text, None
    _, start, matched = min(found)
    return text[:start], matched


@settings(max_examples=1000, deadline=None)
@given(TEXT, STOPS, st.lists(st.integers(0, 30)))
def test_however_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    checker = StopStrings(StopPatterns(stop))
    borders = [0, *sorted(cuts), len(text)]
    sent = ""
    for start, end in zip(borders, borders[1:], strict=False):
        sent += checker.push(text[start:end])
        whole, _ = expected(text, stop)
        assert whole.startswith(sent), "what is sent cannot be taken back"
    if checker.matched is None:
        sent += checker.finish()
    assert (sent, checker.matched) == expected(text, stop)


def test_nothing_is_held_without_need() -> None:
    checker = StopStrings(StopPatterns(["END"]))
    assert checker.push("hello E") == "hello "
    assert checker.push("x") == "Ex"
    assert checker.push("EN") == ""
    assert checker.finish() == "EN"


def test_a_match_across_pieces() -> None:
    checker = StopStrings(StopPatterns(["</answer>"]))
    assert checker.push("42</ans") == "42"
    assert checker.push("wer> and more") == ""
    assert checker.matched == "</answer>"
    assert checker.push("still more") == ""


def test_no_stop_strings() -> None:
    checker = StopStrings(StopPatterns([]))
    assert checker.push("anything") == "anything"
    assert checker.finish() == ""
