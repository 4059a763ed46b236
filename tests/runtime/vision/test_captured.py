"""Answers to chats with pictures, with captured decode steps and steps launched ahead, equal ``model.generate``."""

from __future__ import annotations

import pytest

from tests.runtime.captured_engine import capture_steps, engine_around, runner_of
from tests.runtime.recorded_graph import RecordedGraphs
from tests.runtime.vision.chats import run
from tests.runtime.vision.conftest import Families


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3"])
def test_answers_are_the_same(name: str, families: Families) -> None:
    """Prompts are computed in another way; what follows a picture has rotary positions of its own (M-RoPE)."""
    family, cases = families(name)
    runner = runner_of(family.engine(attention_backend="reference", max_batched_tokens=400))
    graphs = RecordedGraphs()
    capture_steps(runner, graphs, ahead=True)
    mixed = list(cases.values())
    assert run(engine_around(runner), mixed) == [case.answer for case in mixed]
    assert graphs.num_replays > 8
