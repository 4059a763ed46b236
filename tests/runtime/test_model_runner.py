"""The runner, told by hand what to do: two steps in flight are one behind the other, whoever has the slots by then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from lmserve.grammar.build import ChoiceBody, body_text
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.runtime.interface import NewSequence, ScheduledChunk, StepInput, StepOutput
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.sampling_params import SamplingParams
from tests.runtime import test_grammar as grammars
from tests.runtime.captured_engine import capture_steps, make_runner, runner_of
from tests.runtime.test_exactness import BLOCK_SIZE, generated, prompts

WIDTH = 24
"""Blocks for each slot, side by side."""


class Hand:
    """Feeds one runner. Each slot has blocks of its own, and each owner others of them."""

    def __init__(self, runner: PackedModelRunner) -> None:
        self.runner = runner
        self._lengths: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self._num_owners = 0

    def begin(self, slot: int, prompt: tuple[int, ...], grammar: str = "", **sampling: Any) -> Callable[[], Any]:
        """To be put into a step: a new owner's whole prompt."""

        def make() -> tuple[NewSequence, ScheduledChunk]:
            self._num_owners += 1
            first = WIDTH * self._num_owners
            self._lengths[slot] = len(prompt)
            self._tables[slot] = list(range(first, first + -(-len(prompt) // BLOCK_SIZE)))
            params = SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **sampling})
            positions = range(len(prompt) - 1 if params.prompt_logprobs is not None else 0)
            chunk = ScheduledChunk(slot, 0, len(prompt), self._tables[slot], samples=True, prompt_logprobs=positions)
            return NewSequence(slot, prompt, len(prompt), params, 0, grammar=grammar), chunk

        return make

    def go_on(self, slot: int) -> Callable[[], Any]:
        """To be put into a step: the token that was sampled last."""

        def make() -> tuple[None, ScheduledChunk]:
            position = self._lengths[slot]
            self._lengths[slot] += 1
            table = self._tables[slot]
            if position // BLOCK_SIZE == len(table):
                table.append(table[-1] + 1)
            return None, ScheduledChunk(slot, position, 1, table, samples=True)

        return make

    def launch(self, *parts: Callable[[], Any]) -> None:
        made = [part() for part in parts]
        self.runner.launch(StepInput([chunk for _, chunk in made], [new for new, _ in made if new is not None]))

    def step(self, *parts: Callable[[], Any]) -> StepOutput:
        self.launch(*parts)
        return self.runner.collect()

    def run(self, steps: list[list[Callable[[], Any]]], *, ahead: bool) -> list[StepOutput]:
        outputs = []
        for i, parts in enumerate(steps):
            self.launch(*parts)
            if i > 0 or not ahead:
                outputs.append(self.runner.collect())
        return [*outputs, self.runner.collect()] if ahead else outputs


def new_hand(*, captures: bool) -> Hand:
    runner = make_runner("llama")
    if captures:
        capture_steps(runner)
    return Hand(runner)


def sampled(outputs: list[StepOutput]) -> list[int]:
    return [output.token_ids[0] for output in outputs]


@pytest.mark.parametrize("captures", [False, True])
def test_a_token_reaches_the_next_step_without_the_host(captures: bool) -> None:
    hand = new_hand(captures=captures)
    prompt = prompts()[0]
    hand.launch(hand.begin(3, prompt))
    tokens = []
    for _ in range(10):
        hand.launch(hand.go_on(3))
        tokens += hand.runner.collect().token_ids
    assert tuple(tokens) == generated("llama", prompt)[:10]


@pytest.mark.parametrize("captures", [False, True])
def test_two_in_flight_give_what_one_after_the_other_gives(captures: bool) -> None:
    """Penalties, log-probabilities, seeds; and slots that change hands while a step of the last owner is on its way."""

    def story(hand: Hand) -> list[list[Callable[[], Any]]]:
        a, b, c = prompts()[:3]
        begin, go = hand.begin, hand.go_on
        return [
            [begin(0, a, temperature=1.0, seed=3, logprobs=2), begin(1, b, repetition_penalty=1.5)],
            [go(0), go(1)],
            [go(0), go(1)],
            [go(1), begin(0, c, prompt_logprobs=1, presence_penalty=1.0)],
            [go(1), go(0)],
            [begin(1, a, temperature=0.7, seed=9), begin(2, b, logprobs=0, prompt_logprobs=3), go(0)],
            [go(2), go(1), go(0)],
            [go(1), go(0), go(2)],
        ]

    outputs = []
    for ahead in (False, True):
        hand = new_hand(captures=captures)
        outputs.append(hand.run(story(hand), ahead=ahead))
    assert outputs[0] == outputs[1]
    assert [len(output.prompt_logprobs) for output in outputs[1]] == [0, 0, 0, len(prompts()[2]) - 1, 0, 4, 0, 0]


@pytest.mark.parametrize("captures", [False, True])
def test_what_the_last_owner_asked_for_is_reported_though_another_has_the_slot(captures: bool) -> None:
    hand = new_hand(captures=captures)
    a, b = prompts()[:2]
    hand.step(hand.begin(0, a, logprobs=3))
    hand.launch(hand.go_on(0))
    hand.launch(hand.begin(0, b))
    first, second = hand.runner.collect().logprobs, hand.runner.collect().logprobs
    assert first[0] is not None
    assert len(first[0].top) == 3
    assert second == [None]


@pytest.mark.parametrize("captures", [False, True])
def test_a_slots_new_owner_reads_its_own_blocks(captures: bool) -> None:
    """Though its table has entries, on the device, from the last one's decodes."""
    hand = new_hand(captures=captures)
    a, b = prompts()[0], prompts()[4]
    hand.step(hand.begin(0, a))
    for _ in range(6):
        hand.step(hand.go_on(0))
    first = hand.step(hand.begin(0, b))
    assert sampled([first, *(hand.step(hand.go_on(0)) for _ in range(9))]) == list(generated("llama", b)[:10])


@pytest.mark.parametrize("captures", [False, True])
def test_a_row_that_could_not_be_drawn_can_still_be_fed(captures: bool) -> None:
    """The engine ends its sequence, but the next step is on its way by then; its neighbour is none the worse."""
    hand = new_hand(captures=captures)
    a, b = prompts()[:2]
    hand.step(hand.begin(0, a), hand.begin(1, b))
    with torch.inference_mode():
        hand.runner._state.last_tokens[0] = -1
    outputs = [hand.step(hand.go_on(0), hand.go_on(1)) for _ in range(3)]
    assert [output.token_ids[1] for output in outputs] == list(generated("llama", b)[1:4])


def test_there_are_at_most_two_in_flight() -> None:
    hand = new_hand(captures=False)
    with pytest.raises(AssertionError):
        hand.runner.collect()
    hand.launch(hand.begin(0, prompts()[0]))
    hand.launch(hand.go_on(0))
    with pytest.raises(AssertionError):
        hand.launch(hand.go_on(0))


def test_nothing_is_captured_while_a_step_is_in_flight() -> None:
    runner = make_runner("llama")
    steps = capture_steps(runner)
    hand = Hand(runner)
    hand.launch(hand.begin(0, prompts()[0]))
    while runner.use_idle_time():
        pass
    assert len(steps._forwards) == 0
    runner.collect()
    while runner.use_idle_time():
        pass
    assert len(steps._forwards) > 0


# Grammars


def grammar_hand(*, captures: bool) -> tuple[Hand, TokenizerText]:
    runner = runner_of(grammars.make_engine(attention_backend="reference"))
    if captures:
        capture_steps(runner)
    tokenizer = grammars.tokenizer()
    return Hand(runner), TokenizerText.of(tokenizer.backend_tokenizer.to_str(), [tokenizer.eos_token_id])


def text_of(outputs: list[StepOutput]) -> str:
    return str(grammars.tokenizer().decode(sampled(outputs)))


@pytest.mark.parametrize("captures", [False, True])
def test_a_token_is_accepted_before_the_next_mask_is_made(captures: bool) -> None:
    hand, text = grammar_hand(captures=captures)
    hand.runner.use_vocabulary(text)
    steps = [[hand.begin(0, (5, 6, 7), body_text(ChoiceBody(["abcdefgh"])))], *([hand.go_on(0)] for _ in range(7))]
    assert text_of(hand.run(steps, ahead=True)) == "abcdefgh"


@pytest.mark.parametrize("captures", [False, True])
def test_a_slots_new_owner_does_not_hear_of_the_last_ones_token(
    captures: bool, caplog: pytest.LogCaptureFixture
) -> None:
    hand, text = grammar_hand(captures=captures)
    hand.runner.use_vocabulary(text)
    begin = partial(hand.begin, 0)
    steps = [
        [begin((5, 6, 7), body_text(ChoiceBody(["abcd"])))],
        [hand.go_on(0)],
        [begin((8, 9), body_text(ChoiceBody(["xyz"])))],
        [hand.go_on(0)],
        [begin((5, 9), "", temperature=0.0)],
        [begin((3, 4), body_text(ChoiceBody(["pq"])))],
        [hand.go_on(0)],
        [hand.go_on(0)],
        [hand.go_on(0)],
    ]
    with caplog.at_level(logging.ERROR):
        outputs = hand.run(steps, ahead=True)
    assert [text_of(outputs[:2]), text_of(outputs[2:4]), text_of(outputs[5:7])] == ["ab", "xy", "pq"]
    assert sampled(outputs[7:]) == [grammars.tokenizer().eos_token_id] * 2, "once in vain, behind the end"
    assert not caplog.records
