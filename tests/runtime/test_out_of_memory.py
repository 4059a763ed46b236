"""Steps that run out of memory, real engine over real runner: what one held is free when it is tried again."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.runtime import test_exactness as exactness
from tests.runtime.captured_engine import runner_of
from tests.runtime.test_exactness import generated, greedy, prompts


@pytest.fixture
def _no_help(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the collector finds what is held in circles, nor do the tests' own records of the log hold anything."""
    monkeypatch.setattr(logging.getLogger("lmserve.engine.core"), "disabled", True)
    gc.disable()
    yield
    gc.enable()


class Exhausted:
    """In place of a lane's forward: of the first ``count`` steps of several sequences each runs out of memory, with a
    tensor in its hands."""

    def __init__(self, forward: Any, count: int) -> None:
        self._forward = forward
        self._count = count
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, batch: Any) -> Any:
        assert all(tensor() is None for tensor in self.held), "it is still held by the step that failed"
        if len(self.held) < self._count and len(batch.spans) > 1:
            large = torch.zeros(1000)
            self.held.append(weakref.ref(large))
            raise torch.OutOfMemoryError(f"no memory beside {large.numel()} numbers")
        return self._forward(batch)


@pytest.mark.usefixtures("_no_help")
def test_what_the_failed_attempt_held_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = exactness.make_engine("llama", attention_backend="reference")
    lane = runner_of(engine)._lane
    exhausted = Exhausted(lane.forward, 1)
    monkeypatch.setattr(lane, "forward", exhausted)
    answers = exactness.run(engine, [(prompt, greedy()) for prompt in prompts()])
    assert len(exhausted.held) == 1
    assert engine.stats.num_preemptions > 0, "the later half was put off"
    assert answers == [generated("llama", prompt) for prompt in prompts()], "and nobody has noticed"
