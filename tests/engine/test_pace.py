"""What is learnt from the lengths of steps, and what is allowed by it. The lengths are made up."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmserve.engine.pace import GRAIN, MIN_DECODE_STEPS, UNKNOWN_SHARE, Pace, StepCosts

BUDGET = 512


def taught(*, step: float = 0.010, row: float = 0.000_15, prompt_token: float = 0.000_6, noise: float = 0.0) -> Pace:
    """A pace that has seen steps that cost so much."""
    rng = random.Random(0)
    pace = Pace(1.5, BUDGET)
    for _ in range(300):
        num_rows, num_prompt_tokens = rng.randint(1, 32), rng.choice((0, 0, 0, 8, 32, 100))
        seconds = step + row * num_rows + prompt_token * num_prompt_tokens
        pace.costs.observe(num_rows, num_prompt_tokens, seconds * (1 + rng.uniform(-noise, noise)))
    return pace


def test_costs_are_learnt() -> None:
    costs = taught().costs
    assert costs.decode_seconds(1) == pytest.approx(0.010_15, rel=0.01)
    assert costs.decode_seconds(32) == pytest.approx(0.014_8, rel=0.01)
    assert costs.prompt_token_seconds == pytest.approx(0.000_6, rel=0.01)


def test_noise_and_a_stall_do_not_mislead() -> None:
    costs = taught(noise=0.1).costs
    assert costs.decode_seconds(16) == pytest.approx(0.012_4, rel=0.05)
    assert costs.prompt_seconds(32) == pytest.approx(0.000_6 * 32, rel=0.15)
    costs.observe(16, 0, 100.0)
    costs.observe(16, 8, 100.0)
    assert costs.decode_seconds(16) < 0.012_4 * 1.15
    assert costs.prompt_seconds(32) < 0.000_6 * 32 * 1.5


def test_what_decodes_take_is_not_forgotten_while_all_steps_read_nor_the_other_way_round() -> None:
    costs = taught().costs
    for _ in range(2_000):
        costs.observe(8, 16, 0.0112 + 16 * 0.001)
    assert costs.prompt_seconds(16) == pytest.approx(0.016, rel=0.01), "prompt tokens have become dearer"
    assert costs.decode_seconds(8) == pytest.approx(0.0112, rel=0.01)
    for _ in range(2_000):
        costs.observe(8, 0, 0.020)
    assert costs.decode_seconds(8) == pytest.approx(0.020, rel=0.01)
    assert costs.prompt_seconds(16) == pytest.approx(0.016, rel=0.01)


def test_the_first_steps_of_a_worker_are_slow_and_count_little() -> None:
    costs = StepCosts()
    for seconds in (3.0, 0.5, 0.010, 0.012):
        costs.observe(1, 0, seconds)
    assert costs.decode_seconds(1) == 0.010


def test_a_mixed_step_takes_at_most_the_factor_times_a_decode_step() -> None:
    pace = taught()
    for num_rows in (1, 8, 32):
        decode = 0.010 + 0.000_15 * num_rows
        allowed = pace.allowance(num_rows, 1)
        assert allowed % GRAIN == 0
        assert allowed == GRAIN or decode + 0.000_6 * allowed <= 1.5 * decode * 1.01
        assert decode + 0.000_6 * (allowed + GRAIN) > 1.5 * decode, "no less than may be"


def test_a_prompt_gets_on_however_dear_it_is() -> None:
    assert taught(prompt_token=1.0).allowance(8, 1) == GRAIN


def test_no_chunk_is_so_small_that_it_is_there_for_nothing() -> None:
    pace = taught()
    for num_prompt_tokens in (8, 64, 8, 32, 100, 16) * 20:
        pace.costs.observe(8, num_prompt_tokens, 0.0112 + 0.020 + 0.000_5 * num_prompt_tokens)
    assert pace.costs.prompt_seconds(0) == pytest.approx(0.020, rel=0.05)
    assert pace.costs.prompt_token_seconds == pytest.approx(0.000_5, rel=0.05)
    assert pace.allowance(8, 1) == pytest.approx(0.020 / 0.000_5, abs=GRAIN), "though it is more than half a step"


def test_where_nobody_decodes_the_budget_is_whole() -> None:
    assert taught().allowance(0, 1) == BUDGET


def test_without_a_factor_the_budget_is_whole() -> None:
    assert Pace(math.inf, BUDGET).allowance(8, 1) == BUDGET


def test_before_anything_is_known_some_steps_only_decode_and_teach() -> None:
    pace = Pace(1.5, BUDGET)
    pace.costs.observe(0, 512, 0.3)
    for _ in range(MIN_DECODE_STEPS):
        assert pace.allowance(8, 1) == 0
        pace.costs.observe(8, 0, 0.010)
    assert pace.allowance(8, 1) == GRAIN, "a prompt token takes 0.6 ms"


def test_where_that_teaches_nothing_a_mixed_step_has_a_fixed_part() -> None:
    pace = Pace(1.5, BUDGET)
    assert [pace.allowance(8, 0) for _ in range(9)] == [0] * 9, "no prompt is kept out"
    assert [pace.allowance(8, 1) for _ in range(6)] == [0] * MIN_DECODE_STEPS + [BUDGET // UNKNOWN_SHARE] * 2


def test_many_prompts_that_wait_get_more_by_and_by_and_then_less_again() -> None:
    pace = taught()
    alone = pace.allowance(24, 1)
    seen = [pace.allowance(24, 8) for _ in range(300)]
    assert seen == sorted(seen)
    assert seen[0] <= 2 * alone
    assert seen[-1] > 8 * alone
    for _ in range(1_000):
        pace.allowance(24, 0)
    assert pace.allowance(24, 1) == alone


def test_a_crowd_that_waits_is_let_through_at_once() -> None:
    pace = taught()
    assert pace.allowance(num_rows=2, num_prompts=2) == BUDGET
    assert pace.allowance(num_rows=20, num_prompts=11) == BUDGET
    assert pace.allowance(num_rows=3, num_prompts=2) < BUDGET / 4
    assert pace.allowance(num_rows=1, num_prompts=1) < BUDGET / 4, "one beside one is no crowd"


def test_a_burst_that_met_few_who_decode_is_soon_forgotten() -> None:
    pace = taught()
    for _ in range(8):
        pace.allowance(1, 8)
    assert pace.allowance(8, 1) <= 3 * taught().allowance(8, 1)


def test_a_token_with_a_long_context_counts_for_more() -> None:
    pace = taught(step=0.040)
    plain = pace.allowance(8, 1)
    assert pace.allowance(8, 1, token_work=2.0) == pytest.approx(plain / 2, abs=GRAIN)


def test_a_long_prompt_and_a_short_one_beside_many_rows_are_not_too_many() -> None:
    pace = taught()
    assert [pace.allowance(8, 2) for _ in range(300)] == [pace.allowance(8, 1)] * 300
    for _ in range(300):
        pace.allowance(2, 2)
    assert pace.allowance(2, 2) > 4 * taught().allowance(2, 1), "beside two they are"


@given(
    st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(allow_nan=True), st.integers(0, 100)), max_size=40
    ),
    st.floats(1, 1_000),
)
def test_whatever_was_measured_the_allowance_is_one(steps: list[tuple[int, int, float, int]], factor: float) -> None:
    pace, num_nothing = Pace(factor, BUDGET), 0
    for num_rows, num_prompt_tokens, seconds, num_prompts in steps:
        if num_rows + num_prompt_tokens:
            pace.costs.observe(num_rows, num_prompt_tokens, seconds)
        allowed = pace.allowance(num_rows, num_prompts)
        assert allowed <= BUDGET
        num_nothing += allowed < GRAIN and num_prompts > 0
    assert num_nothing <= MIN_DECODE_STEPS


@pytest.mark.parametrize(("decode", "prompt"), [(1e308, 1e-9), (1e-9, 1e308), (1e308, 1e308)])
def test_a_clock_gone_mad_stops_nobody(decode: float, prompt: float) -> None:
    pace = Pace(1e10, BUDGET)
    for _ in range(5):
        pace.costs.observe(8, 0, decode)
    pace.costs.observe(8, 8, prompt)
    pace.costs.observe(8, 64, prompt)
    assert GRAIN <= pace.allowance(8, 3) <= BUDGET
