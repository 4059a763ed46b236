"""With captured decode steps, and steps launched before the last one is collected, the engine gives the same tokens."""

from __future__ import annotations

import pytest

from lmserve.sampling_params import SamplingParams
from tests.runtime import test_exactness as exactness
from tests.runtime import test_grammar as grammars
from tests.runtime.captured_engine import capture_steps, captured, engine_around, make_runner, runner_of, sizes_used
from tests.runtime.test_exactness import generated, greedy, mixed_sampling, prompts
from tests.runtime.tiny_models import FAMILIES

FEW = ["llama", "gemma3", "deepseek-v3"]
AHEAD = [pytest.param(False, marks=pytest.mark.slow), True]


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_greedy_output_is_what_a_plain_script_gets(family: str, ahead: bool) -> None:
    """Requests that end one after the other, so that the sizes of steps shrink, over block borders and windows."""
    engine, steps, graphs = captured(family, ahead=ahead, max_batched_tokens=64)
    used = sizes_used(steps)
    requests = [(prompt, greedy(2 + i)) for i, prompt in enumerate(prompts())]
    answers = [generated(family, prompt)[: 2 + i] for i, prompt in enumerate(prompts())]
    assert exactness.run(engine, requests) == answers
    assert set(used) >= {2, 4, 8}
    assert graphs.num_replays == 2 * sum(used.values()), "with a graph that draws for each that computes"
    assert exactness.run(engine, list(reversed(requests))) == list(reversed(answers))


@pytest.mark.parametrize("ahead", [False, True])
def test_after_preemption(ahead: bool) -> None:
    """Slots and blocks get other owners."""
    engine, _, graphs = captured("gemma2", ahead=ahead, num_blocks=26, max_batched_tokens=16)
    expected = [generated("gemma2", prompt) for prompt in prompts()]
    assert exactness.run(engine, [(prompt, greedy()) for prompt in prompts()]) == expected
    assert engine.stats.num_preemptions > 0
    assert graphs.num_replays > 10


def test_with_pauses() -> None:
    engine, _, graphs = captured("llama", ahead=True, max_batched_tokens=64)
    expected = [generated("llama", prompt) for prompt in prompts()]
    assert exactness.run(engine, [(prompt, greedy()) for prompt in prompts()], pauses=True) == expected
    assert graphs.num_replays > 0


@pytest.mark.parametrize("ahead", AHEAD)
def test_every_way_of_sampling_in_changing_company(ahead: bool) -> None:
    requests = [(prompts()[i % len(prompts())][i // 9 :] or (5,), mixed_sampling(i)) for i in range(32)]
    expected = exactness.run(engine_around(make_runner("llama", max_batched_tokens=64)), requests)
    engine, steps, _ = captured("llama", ahead=ahead, max_batched_tokens=64)
    used = sizes_used(steps)
    assert exactness.run(engine, requests) == expected
    assert max(used) >= 32


def captured_sampling(i: int) -> SamplingParams:
    """What is drawn by graphs, greedy rows among others."""
    return SamplingParams(
        max_tokens=6 + i % 7,
        seed=i,
        ignore_eos=True,
        temperature=(0.0, 0.8, 1.3)[i % 3],
        top_p=(1.0, 0.7)[i // 2 % 2],
        top_k=(0, 20, 100)[i // 4 % 3],
        min_p=(0.0, 0.05)[i % 2],
        logprobs=2 if i % 5 == 0 else None,
    )


@pytest.mark.parametrize("ahead", AHEAD)
def test_sampling_by_graphs(ahead: bool) -> None:
    requests = [(prompts()[i % len(prompts())], captured_sampling(i)) for i in range(18)]
    expected = exactness.run(engine_around(make_runner("qwen3", max_batched_tokens=64)), requests)
    engine, steps, graphs = captured("qwen3", ahead=ahead, max_batched_tokens=64)
    used = sizes_used(steps)
    assert exactness.run(engine, requests) == expected
    assert graphs.num_replays == 2 * sum(used.values()), "with a graph that draws for each that computes"
    assert len({kind for _, kind in steps._draws._captured}) > 2


@pytest.mark.parametrize("ahead", AHEAD)
def test_grammars(ahead: bool) -> None:
    wanted = [grammars.request(f"r{i}", grammars.GRAMMAR, temperature=i % 2) for i in range(6)]
    wanted += [grammars.request(f"free{i}", "", max_tokens=40, temperature=i % 2) for i in range(3)]
    expected = grammars.run(grammars.make_engine(), wanted)
    runner = runner_of(grammars.make_engine(attention_backend="reference"))
    capture_steps(runner, ahead=ahead)
    assert grammars.run(grammars.with_vocabulary(engine_around(runner)), wanted) == expected
