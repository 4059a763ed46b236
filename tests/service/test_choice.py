from __future__ import annotations

from collections.abc import Sequence

from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.sampling_params import SamplingParams
from lmserve.service.choice import Choice
from lmserve.service.deltas import ChoiceDelta, Finished, StopReason, TextDelta
from lmserve.service.model_text import ModelText
from lmserve.service.stop_strings import StopPatterns
from tests.service import tokenizers_for_tests as made

TEXT = ModelText(made.byte_level())
EOS = TEXT.eos_token_ids[0]


def choice(*stop: str, min_tokens: int = 0) -> Choice:
    sampling = SamplingParams(max_tokens=100, min_tokens=min_tokens)
    return Choice(0, sampling, TEXT.detokenizer(begins_text=True), StopPatterns(stop), TEXT.table)


def push(
    to: Choice, token_ids: Sequence[int], reason: FinishReason | None = None, *, logprobs: bool = False
) -> list[ChoiceDelta]:
    entries = tuple(TokenLogprobs(-1.0, ((i, -1.0),)) for i in token_ids) if logprobs else ()
    return to.push(RequestOutput("r", 0, tuple(token_ids), entries, 0, reason), context_full=False)


def test_tokens_become_text() -> None:
    assert push(choice(), TEXT.encode_rendered("hello")) == [TextDelta(0, "hello")]


def test_half_a_character_is_no_delta() -> None:
    first, *rest = TEXT.encode_rendered("\u00e9")
    current = choice()
    assert push(current, [first]) == []
    assert push(current, rest) == [TextDelta(0, "\u00e9")]


def test_the_token_that_ends_a_choice_has_no_text() -> None:
    """Also where it is an ordinary one: the client named it as a stop token."""
    current = choice()
    deltas = push(current, TEXT.encode_rendered("ab"), FinishReason.STOP)
    assert deltas == [TextDelta(0, "a"), Finished(0, FinishReason.STOP, StopReason.EOS_FOUND)]
    assert len(current.token_ids) == 2, "it was generated, so it counts"


def test_length() -> None:
    deltas = push(choice(), TEXT.encode_rendered("ab"), FinishReason.LENGTH)
    assert deltas == [
        TextDelta(0, "ab"),
        Finished(0, FinishReason.LENGTH, StopReason.MAX_PREDICTED_TOKENS_REACHED),
    ]


def test_a_stop_string_ends_the_choice_and_what_follows_does_not_count() -> None:
    current = choice("c")
    deltas = push(current, TEXT.encode_rendered("abcd"))
    assert deltas == [TextDelta(0, "ab"), Finished(0, FinishReason.STOP, StopReason.STOP_STRING_FOUND)]
    assert current.token_ids == TEXT.encode_rendered("abc")


def test_half_a_stop_string_at_the_end_is_text() -> None:
    current = choice("xyz")
    assert push(current, TEXT.encode_rendered("axy")) == [TextDelta(0, "a")]
    deltas = push(current, [EOS], FinishReason.STOP)
    assert deltas == [TextDelta(0, "xy"), Finished(0, FinishReason.STOP, StopReason.EOS_FOUND)]
    assert current.text == "axy"


def test_stop_strings_wait_for_min_tokens() -> None:
    current = choice("a", min_tokens=3)
    assert push(current, TEXT.encode_rendered("aabab"))[0] == TextDelta(0, "aab")


def logprob_tokens(deltas: list[ChoiceDelta]) -> list[str]:
    return [position.sampled.text for delta in deltas if isinstance(delta, TextDelta) for position in delta.logprobs]


def test_logprobs_travel_with_their_text() -> None:
    current = choice("xyz")
    a, x, y, b = (TEXT.encode_rendered(c)[0] for c in "axyb")
    assert logprob_tokens(push(current, [a, x], logprobs=True)) == ["a"]
    assert logprob_tokens(push(current, [y], logprobs=True)) == []
    assert logprob_tokens(push(current, [b], logprobs=True)) == ["x", "y", "b"]


def test_logprobs_of_a_stop_string_and_of_the_end_are_not_sent() -> None:
    current = choice("xy")
    assert logprob_tokens(push(current, TEXT.encode_rendered("axyb"), logprobs=True)) == ["a"]
    ended = push(choice(), [*TEXT.encode_rendered("ab"), EOS], FinishReason.STOP, logprobs=True)
    assert logprob_tokens(ended) == ["a", "b"]


def test_offsets_count_from_the_end_of_the_echo() -> None:
    sampling = SamplingParams(max_tokens=100)
    current = Choice(
        0, sampling, TEXT.detokenizer(begins_text=False), StopPatterns(["xyz"]), TEXT.table, text_offset=10
    )
    [delta] = push(current, TEXT.encode_rendered("a\u00e9bx"), logprobs=True)
    assert isinstance(delta, TextDelta)
    assert [position.text_offset for position in delta.logprobs] == [10, 11, 11, 12]
    assert current.text == "a\u00e9b"


def test_logprobs_of_half_characters_come_with_the_character() -> None:
    current = choice()
    first, second = TEXT.encode_rendered("\u00e9")
    assert push(current, [first], logprobs=True) == []
    [delta] = push(current, [second], logprobs=True)
    assert isinstance(delta, TextDelta)
    assert [position.sampled.bytes for position in delta.logprobs] == [b"\xc3", b"\xa9"]
    assert [position.text_offset for position in delta.logprobs] == [0, 0]


def test_a_scored_end_has_its_entry_where_it_is_asked_for() -> None:
    """An evaluation harness counts one entry for each generated token, the ending one included."""
    sampling = SamplingParams(max_tokens=100)
    detokenizer = TEXT.detokenizer(begins_text=False)
    current = Choice(0, sampling, detokenizer, StopPatterns(()), TEXT.table, text_offset=7, reports_end=True)
    scored, finished = push(current, [EOS], FinishReason.STOP, logprobs=True)
    assert isinstance(scored, TextDelta)
    assert (scored.text, [entry.sampled.token_id for entry in scored.logprobs]) == ("", [EOS])
    assert scored.logprobs[0].text_offset == 7
    assert finished == Finished(0, FinishReason.STOP, StopReason.EOS_FOUND)
