"""The echo of a prompt, from the request to the deltas. What else a run does is tested in ``test_generation.py``."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lmserve.errors import StepFailed
from lmserve.outputs import FinishReason
from lmserve.service.deltas import Delta, Finished, PositionLogprobs, StopReason, TextDelta, Usage
from lmserve.service.request import GenerationRequest
from tests.service.test_generation import EOS, TEXT, Bench, read_events, says, to_the_end

PROMPT = "he h\u00e9 world"
PROMPT_IDS = TEXT.encode(PROMPT)
LENGTH = StopReason.MAX_PREDICTED_TOKENS_REACHED

Shown = list[tuple[bytes, float | None, int]]
"""Bytes, log-probability and text offset of each position."""


async def deltas_of(bench: Bench, request: GenerationRequest) -> list[Delta]:
    return [delta async for delta in bench.service.stream(request)]


def shown(positions: Sequence[PositionLogprobs]) -> Shown:
    return [(p.sampled.bytes, None if p.is_unpredicted else p.sampled.logprob, p.text_offset) for p in positions]


def expected_echo(token_ids: list[int]) -> Shown:
    """What the stub engine says of a prompt."""
    entries: Shown = []
    data = b""
    for i, token_id in enumerate(token_ids):
        entries.append((TEXT.table.piece(token_id), -float(i) if i else None, len(data.decode("utf-8", "ignore"))))
        data += TEXT.table.piece(token_id)
    return entries


def test_the_first_delta_is_the_prompt() -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete(PROMPT, echo=True)
        assert request.echo
        assert await deltas_of(bench, request) == [
            TextDelta(0, PROMPT),
            TextDelta(0, " w"),
            TextDelta(0, "o"),
            Finished(0, FinishReason.STOP, StopReason.EOS_FOUND),
            Usage(len(PROMPT_IDS), 3, 0),
        ]
        [sent] = bench.engine.requests
        assert sent.sampling.prompt_logprobs is None, "nobody wants them"

    Bench(says(" wo")).run(scenario)


@pytest.mark.parametrize("prompt_tokens_per_step", [1, 4, 100])
def test_with_the_log_probability_of_every_token(prompt_tokens_per_step: int) -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.prompt_tokens_per_step = prompt_tokens_per_step
        request = await bench.complete(PROMPT, echo=True, logprobs=2)
        echo, first, second, *_ = await deltas_of(bench, request)
        assert isinstance(echo, TextDelta)
        assert (echo.text, shown(echo.logprobs)) == (PROMPT, expected_echo(PROMPT_IDS))
        tops = [[(top.token_id, top.logprob) for top in position.top] for position in echo.logprobs]
        assert tops == [[], *([(t, -float(i)), (t + 1, -i - 1.0)] for i, t in list(enumerate(PROMPT_IDS))[1:])]
        assert isinstance(first, TextDelta)
        assert isinstance(second, TextDelta)
        assert shown(first.logprobs) == [(b" w", -0.5, len(PROMPT))]
        assert shown(second.logprobs) == [(b"o", -0.5, len(PROMPT) + 2)]

    Bench(says(" wo")).run(scenario)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_nothing_but_the_prompt(logprobs: int | None) -> None:
    """How an evaluation harness scores a text."""

    async def scenario(bench: Bench) -> None:
        request = await bench.complete(PROMPT, echo=True, logprobs=logprobs, max_tokens=0)
        answer = await bench.answer(request)
        [choice] = answer.choices
        assert choice.text == PROMPT
        assert shown(choice.logprobs) == ([] if logprobs is None else expected_echo(PROMPT_IDS))
        assert choice.finished == Finished(0, FinishReason.LENGTH, LENGTH)
        assert answer.usage == Usage(len(PROMPT_IDS), 0, 0)

    Bench(says("never said")).run(scenario)


def test_a_prompt_of_one_token_has_no_log_probability() -> None:
    async def scenario(bench: Bench) -> None:
        answer = await bench.answer(await bench.complete("h", echo=True, logprobs=0, max_tokens=1))
        assert shown(answer.choices[0].logprobs) == [(b"h", None, 0), (b"o", -0.5, 1)]

    Bench(says("o")).run(scenario)


def test_token_ids_are_shown_as_text() -> None:
    async def scenario(bench: Bench) -> None:
        bos = TEXT.tokenizer.bos_token_id
        answer = await bench.answer(await bench.complete([bos, *PROMPT_IDS], echo=True, logprobs=0, max_tokens=1))
        [choice] = answer.choices
        assert choice.text == "<s>" + PROMPT + "!"
        assert [p.text_offset for p in choice.logprobs[:3]] == [0, 3, 5]
        assert choice.logprobs[-1].text_offset == len("<s>" + PROMPT)

    Bench(says("!")).run(scenario)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_every_choice_of_every_prompt_begins_with_its_own(logprobs: int | None) -> None:
    """Choice 1 generates while choice 0 still reports the prompt; its text waits."""

    async def scenario(bench: Bench) -> None:
        bench.engine.prompt_tokens_per_step = 2
        prompts = (PROMPT, "hello")
        request = await bench.complete(*prompts, n=3, echo=True, logprobs=logprobs, max_tokens=4)
        deltas = await deltas_of(bench, request)
        for number in range(6):
            prompt = prompts[number // 3]
            mine = [delta for delta in deltas if not isinstance(delta, Usage) and delta.choice == number]
            echo, *generated, end = mine
            assert isinstance(echo, TextDelta)
            assert echo.text == prompt
            assert shown(echo.logprobs) == (expected_echo(TEXT.encode(prompt)) if logprobs is not None else [])
            assert [delta.text for delta in generated if isinstance(delta, TextDelta)] == list("abc") + [
                str(number % 3)
            ]
            assert end == Finished(number, FinishReason.LENGTH, LENGTH)
        assert deltas[-1] == Usage(len(PROMPT_IDS) + len(TEXT.encode("hello")), 24, 0)

    Bench(lambda request, choice: TEXT.encode_rendered(f"abc{choice}zz")).run(scenario)


def test_stop_strings_are_not_sought_in_the_prompt() -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete("a.b", "c", echo=True, logprobs=0, stop=(".", "ax"), n=2)
        answer = await bench.answer(request)
        assert [choice.text for choice in answer.choices] == ["a.bx", "a.bx", "cx", "cx"]
        assert {position.text_offset for position in answer.choices[0].logprobs} == {0, 1, 2, 3}

    Bench(says("x.y")).run(scenario)


def test_a_choice_that_ended_while_it_waited_is_not_ended_twice() -> None:
    async def scenario(bench: Bench) -> None:
        bench.engine.prompt_tokens_per_step = 1
        request = await bench.complete(PROMPT, n=2, echo=True, logprobs=0, stop=("b",), max_tokens=3)
        deltas = await deltas_of(bench, request)
        ends = [delta for delta in deltas if isinstance(delta, Finished)]
        assert [end.choice for end in ends] == [1, 0]
        assert {end.stop_reason for end in ends} == {StopReason.STOP_STRING_FOUND}
        assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == PROMPT * 2 + "aa"

    Bench(says("abc")).run(scenario)


def test_nothing_is_said_before_the_engine_has_taken_the_prompt_on() -> None:
    """A full queue must still be able to become a status."""

    async def scenario(bench: Bench) -> None:
        bench.engine.error, bench.engine.error_after = "out of memory", 0
        request = await bench.complete(PROMPT, echo=True)
        with pytest.raises(StepFailed):
            await anext(bench.service.stream(request))

    Bench(says("x")).run(scenario)


def test_the_log_shows_the_prompt_once() -> None:
    async def scenario(bench: Bench) -> None:
        request = await bench.complete(PROMPT, echo=True, logprobs=0, max_tokens=2)
        went_in, came_out = await read_events(bench, request, to_the_end)
        assert went_in["input"] == PROMPT
        assert came_out["output"] == "xy"
        assert came_out["stats"]["predictedTokensCount"] == 2

    Bench(lambda request, choice: [*TEXT.encode_rendered("xyz"), EOS]).run(scenario)
