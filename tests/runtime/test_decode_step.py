"""Which decode steps are captured, and that nothing shows of what lies in padding rows and unused entries."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.outputs import TokenLogprobs
from lmserve.runtime.decode_step import DecodeSteps, step_sizes
from lmserve.runtime.graphs import CaptureFailed, Graph
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.sampling_params import SamplingParams
from tests.runtime import test_exactness as exactness
from tests.runtime.captured_engine import capture_steps, captured, engine_around, make_runner, runner_of
from tests.runtime.recorded_graph import RecordedGraphs
from tests.runtime.test_exactness import BLOCK_SIZE, MAX_LEN, generated, greedy, prompts
from tests.runtime.tiny_models import VOCAB_SIZE

Requests = Sequence[tuple[tuple[int, ...], SamplingParams]]


# The same bits


def outputs_of(engine: EngineCore, requests: Requests) -> dict[str, list[tuple[int, TokenLogprobs]]]:
    found: defaultdict[str, list[tuple[int, TokenLogprobs]]] = defaultdict(list)
    for i, (prompt, sampling) in enumerate(requests):
        engine.add_request(AddRequest(str(i), list(prompt), sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += zip(output.token_ids, output.logprobs, strict=True)
    return dict(found)


def spoil(runner: PackedModelRunner, steps: DecodeSteps) -> Callable[[], int]:
    """Before each step, puts what it likes wherever no sequence has anything. Returns how often it did."""
    random = np.random.default_rng(3)
    make_padding, tables = steps._padding, steps.tables
    scratch = slice(runner.info.num_blocks * BLOCK_SIZE, None)
    times = 0

    def padding(size: int) -> NDArray[np.int64]:
        nonlocal times
        times += 1
        numbers = make_padding(size)
        numbers[1] = random.integers(0, MAX_LEN, size)  # positions, tokens, rotary positions
        numbers[2] = random.integers(-1, VOCAB_SIZE, size)
        numbers[3] = random.integers(0, MAX_LEN, size)
        numbers[4] += random.integers(0, tables.blocks.shape[1], size)  # places of padding's own table
        for slot, num_known in enumerate(tables._num_known):
            unused = tables.blocks[slot, num_known:]
            unused.copy_(torch.from_numpy(random.integers(0, runner.info.num_blocks + 1, len(unused))))
        lane: Any = runner._lane
        for layer in lane._cache.layers.values():
            for pool in (layer.k, layer.v):
                pool[scratch] = torch.randn(pool[scratch].shape) * 1e3
        runner._state.last_tokens[-1] = int(random.integers(-1, VOCAB_SIZE))
        if steps._logits is not None:
            steps._logits.fill_(float("nan"))
        return numbers

    steps._padding = padding  # type: ignore[method-assign]
    return lambda: times


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # experts get other bits with other numbers of rows
def test_what_lies_in_padding_and_in_unused_entries_changes_no_bit(family: str) -> None:
    requests = [
        (
            prompt,
            SamplingParams(
                max_tokens=6 + i % 7, seed=i, ignore_eos=True, logprobs=20, temperature=i % 2, top_p=1 - i % 3 / 4
            ),
        )
        for i, prompt in enumerate(prompts())
    ]
    clean, *_ = captured(family, max_batched_tokens=64, num_blocks=60)
    engine, steps, _ = captured(family, max_batched_tokens=64, num_blocks=60)
    times = spoil(runner_of(engine), steps)
    assert outputs_of(engine, requests) == outputs_of(clean, requests)
    assert times() > 20


# Which graphs there are


def test_sizes_are_close_and_few() -> None:
    assert step_sizes(256) == [2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert step_sizes(1) == [2]
    assert step_sizes(40)[-1] == 48
    sizes = step_sizes(4096)
    assert sizes[-1] >= 4096
    assert len(sizes) < 35


def test_the_largest_is_captured_first_and_the_others_when_they_are_wanted() -> None:
    engine, steps, _ = captured("llama")
    exactness.run(engine, [(prompts()[1], greedy())])
    assert list(steps._forwards._captured) == [step_sizes(exactness.MAX_SEQS)[-1], 2]
    assert [size for size, _ in steps._draws._captured] == [2]


def test_idle_time_captures_the_rest() -> None:
    engine, steps, graphs = captured("llama")
    exactness.run(engine, [(prompts()[1], SamplingParams(max_tokens=3, temperature=0.5, ignore_eos=True))])
    while engine.use_idle_time():
        pass
    sizes = step_sizes(exactness.MAX_SEQS)
    assert set(steps._forwards._captured) == set(sizes)
    assert len(steps._draws) == 2 * len(sizes), "greedy, and what was seen"
    before = graphs.num_captures
    exactness.run(engine, [(prompt, greedy()) for prompt in prompts()])
    assert graphs.num_captures == before


class FailingGraphs(RecordedGraphs):
    """Can capture so many, then no more."""

    def __init__(self, num_left: int) -> None:
        super().__init__()
        self.num_left = num_left

    def capture(self, run: Callable[[], object]) -> Any:
        if self.num_left == 0:
            raise CaptureFailed("no memory for another")
        self.num_left -= 1
        graph: Graph = super().capture(run)
        return graph


@pytest.mark.parametrize("num_left", [0, 1, 2, 3])
def test_where_nothing_can_be_captured_steps_run_as_ever(num_left: int, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner("llama")
    graphs = FailingGraphs(num_left)
    steps = capture_steps(runner, graphs, ahead=True)
    engine = engine_around(runner)
    expected = [generated("llama", prompt) for prompt in prompts()]
    with caplog.at_level(logging.WARNING):
        assert exactness.run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected
        while engine.use_idle_time():
            pass
    assert "no memory for another" in caplog.text
    assert 1 <= len(caplog.records) <= 2, "it says so once for the forward and once for drawing"
    assert graphs.num_captures == num_left
    assert len(steps._forwards) + len(steps._draws) == num_left
