"""Steps that fail half way are tried again, and the states of their sequences are what they were."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmserve.engine.messages import AddRequest
from lmserve.outputs import FinishReason
from tests.runtime.captured_engine import runner_of
from tests.runtime.test_exactness import greedy, prompts, run
from tests.runtime.test_in_turn import generated, make_engine


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class FailsSometimes:
    """A hook of the model's that raises behind some forwards, when the model has changed what it was given."""

    def __init__(self, at: tuple[int, ...], error: type[Exception]) -> None:
        self._at = at
        self._error = error
        self.num_calls = self.num_failures = 0

    def __call__(self, *_: Any) -> None:
        self.num_calls += 1
        if self.num_calls in self._at:
            self.num_failures += 1
            raise self._error("no memory")


@pytest.mark.parametrize("family", ["lfm2", "qwen3.5", "mamba", "bloom"])
def test_out_of_memory_within_a_step_changes_no_answer(family: str) -> None:
    """Of a step's several forwards one fails: those before it have been computed, and are computed again."""
    engine = make_engine(family, max_batched_tokens=40)
    fails = FailsSometimes((3, 10, 17, 24, 31, 38), torch.OutOfMemoryError)
    lane: Any = runner_of(engine)._lane
    lane.model.register_forward_hook(fails)
    asked = prompts()[:6]
    assert run(engine, [(prompt, greedy()) for prompt in asked]) == [generated(family, prompt) for prompt in asked]
    assert fails.num_failures >= 2
    assert engine.stats.num_preemptions > 0


@pytest.mark.parametrize("family", ["lfm2", "qwen3.5", "bloom"])
@pytest.mark.parametrize("saves", [True, False])
def test_out_of_memory_behind_the_forwards_changes_no_answer(family: str, saves: bool) -> None:
    """All of a step's states have been made when it fails, and are made again from those before."""
    engine = make_engine(family, max_batched_tokens=40, prefix_caching=saves)
    runner: Any = runner_of(engine)
    real, fails = runner._sampler, FailsSometimes((1, 3, 6, 8), torch.OutOfMemoryError)

    def sample(*arguments: Any) -> Any:
        fails()
        return real(*arguments)

    runner._sampler = sample
    asked = prompts()[:6]
    assert run(engine, [(prompt, greedy()) for prompt in asked]) == [generated(family, prompt) for prompt in asked]
    assert fails.num_failures == 4
    assert run(engine, [((*prompts()[0], 5), greedy())]) == [generated(family, (*prompts()[0], 5))], "what was saved"


@pytest.mark.parametrize("family", ["lfm2", "bloom"])
def test_other_errors_end_the_step_and_what_comes_later_is_right(family: str) -> None:
    engine = make_engine(family, max_batched_tokens=40)
    lane: Any = runner_of(engine)._lane
    handle = lane.model.register_forward_hook(FailsSometimes(tuple(range(3, 99)), RuntimeError))
    for i, prompt in enumerate(prompts()[:3]):
        engine.add_request(AddRequest(f"lost {i}", list(prompt), greedy()))
    ends = [output for _ in range(20) for output in engine.step() if output.finish_reason is not None]
    assert [output.finish_reason for output in ends] == [FinishReason.ERROR] * 3
    engine.check_integrity()
    handle.remove()
    assert run(engine, [(prompts()[0], greedy())]) == [generated(family, prompts()[0])]
