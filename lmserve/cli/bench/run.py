"""A run of the benchmark: each scenario warmed up and measured, some rounds of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from lmserve.cli.bench.load import MixedLoad, Target, closed_loop, mixed_load, open_loop
from lmserve.cli.bench.prompts import PromptMaker, accepted
from lmserve.cli.bench.results import Figures, ScenarioResult, Timing, percentile, summarise
from lmserve.cli.bench.scenarios import Scenario

WARM_UP_TOKENS = 8
MOST_SHORTS = 64
"""Short prompts that come in at most while a long one is read."""

Say = Callable[[str], None]


def measure(target: Target, scenarios: Sequence[Scenario], rounds: int, say: Say) -> list[ScenarioResult]:
    """All scenarios, one after the other. Raises LoadFailed."""
    target = accepted(target, say)
    prompts = PromptMaker.ask(target)
    results = []
    for scenario in scenarios:
        warm_up = min(scenario.streams, scenario.num_requests)
        _run(target, prompts, replace(scenario, num_requests=warm_up, new_tokens=WARM_UP_TOKENS, rate=0.0), "warm")
        figures = []
        for number in range(rounds):
            figures.append(_run(target, prompts, scenario, f"{number}"))
            say(f"{scenario.name}, round {number + 1}: {_in_short(scenario, figures[-1])}")
        results.append(ScenarioResult(scenario.name, scenario.description, figures))
    return results


def _run(target: Target, prompts: PromptMaker, scenario: Scenario, seed: str) -> Figures:
    name = f"{scenario.name}.{seed}"
    if scenario.long_tokens:
        return _mixed(target, prompts, scenario, name)
    if scenario.shared_tokens:
        chats = [
            prompts.shared(scenario.shared_tokens, scenario.prompt_tokens, f"{name}.{i}")
            for i in range(scenario.num_requests)
        ]
    else:
        chats = [prompts.user(scenario.prompt_tokens, f"{name}.{i}") for i in range(scenario.num_requests)]
    if scenario.rate:
        return summarise(asyncio.run(open_loop(target, chats, rate=scenario.rate, max_tokens=scenario.new_tokens)))
    return summarise(asyncio.run(closed_loop(target, chats, streams=scenario.streams, max_tokens=scenario.new_tokens)))


def _mixed(target: Target, prompts: PromptMaker, scenario: Scenario, name: str) -> Figures:
    """The chats' throughput and gaps; the times to a first token are those of the short prompts."""
    chats = [prompts.user(scenario.prompt_tokens, f"{name}.{i}") for i in range(scenario.streams)]
    long = prompts.user(scenario.long_tokens, f"{name}.long")
    shorts = [prompts.user(scenario.prompt_tokens, f"{name}.short{i}") for i in range(MOST_SHORTS)]
    return of_mixed(asyncio.run(mixed_load(target, chats, long, shorts, max_tokens=scenario.new_tokens)))


def of_mixed(load: MixedLoad) -> Figures:
    """The figures of a long prompt among others."""
    everything: list[Timing] = [*load.chats, *load.shorts, load.long]
    firsts = [timing.time_to_first_token for timing in load.shorts]
    return msgspec.structs.replace(
        summarise(everything),
        between_pieces_p50=summarise(load.chats).between_pieces_p50,
        between_pieces_p95=summarise(load.chats).between_pieces_p95,
        time_to_first_token_p50=percentile(firsts, 0.5) if firsts else None,
        time_to_first_token_p95=percentile(firsts, 0.95) if firsts else None,
        long_prompt_seconds=load.long.time_to_first_token,
    )


def _in_short(scenario: Scenario, figures: Figures) -> str:
    first = figures.time_to_first_token_p50
    parts = [
        f"{figures.output_tokens_per_second:.1f} output tokens/s",
        f"{figures.total_tokens_per_second:.0f} with prompts",
    ]
    if first is not None:
        parts.append(f"first token after {first * 1e3:.0f} ms")
    if figures.between_pieces_p50 and figures.between_pieces_p95:
        parts.append(
            f"then every {figures.between_pieces_p50 * 1e3:.1f} ms (p95 {figures.between_pieces_p95 * 1e3:.1f})"
        )
    if figures.long_prompt_seconds is not None:
        parts.append(f"the long prompt took {figures.long_prompt_seconds:.1f} s")
    return ", ".join(parts)
