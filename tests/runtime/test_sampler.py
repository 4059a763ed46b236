"""What the sampler computes: greedy rows, the distribution of others, the order of operations, log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lmserve.runtime.sampler import Sampler
from lmserve.runtime.sampling_state import SamplingState
from lmserve.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.runtime.sampler_rows import EOS, OUTPUT, PROMPT, VOCAB, give_slot, make_logits, make_sampler, sample


def draw(logits: Tensor, num_draws: int, **row: Any) -> Counter[int]:
    """How often each token comes out at ``num_draws`` different positions of one sequence."""
    sampler, state = make_sampler([{**row, "seed": seed} for seed in range(50)], len(logits))
    batch = logits.expand(50, -1)
    counts: Counter[int] = Counter()
    for position in range(num_draws // 50):
        counts.update(sample(sampler, state, batch, positions=position).token_ids.tolist())
    return counts


def chi_square(counts: Counter[int], probs: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens expected less than five times are put together."""
    total = sum(counts.values())
    cells: dict[int, tuple[float, float]] = {}
    for token_id, p in enumerate(probs.tolist()):
        cell = token_id if p * total >= 5 else -1
        observed, expected = cells.get(cell, (0.0, 0.0))
        cells[cell] = (observed + counts[token_id], expected + p * total)
    assert all(expected > 0 or observed == 0 for observed, expected in cells.values())
    used = [(observed, expected) for observed, expected in cells.values() if expected > 0]
    return sum((observed - expected) ** 2 / expected for observed, expected in used), len(used) - 1


def assert_drawn_from(counts: Counter[int], probs: Tensor) -> None:
    statistic, freedom = chi_square(counts, probs)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_largest_and_among_equals_the_first(dtype: torch.dtype) -> None:
    logits = make_logits(8).to(dtype)
    logits[3, [40, 900, 41]] = 50.0
    sampler, state = make_sampler([{"temperature": 0}] * 8)
    before = logits.clone()
    token_ids = sample(sampler, state, logits).token_ids.tolist()
    assert token_ids == logits.float().argmax(-1).tolist()
    assert token_ids[3] == 40
    assert torch.equal(logits, before)


def test_no_rows_no_tokens() -> None:
    sampler, state = make_sampler([])
    assert sample(sampler, state, torch.empty(0, VOCAB), []).token_ids.shape == (0,)


@pytest.mark.parametrize(
    "row", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5}, {"typical_p": 0.5}]
)
def test_a_row_that_cannot_be_drawn_from_says_so_and_spoils_no_other(row: dict[str, Any]) -> None:
    logits = make_logits(4)
    sampler, state = make_sampler([row] * 4)
    expected = sample(sampler, state, logits).token_ids.tolist()
    logits[1, 17] = math.nan
    logits[2] = -math.inf
    assert sample(sampler, state, logits).token_ids.tolist() == [expected[0], -1, -1, expected[3]]


def test_one_possible_token_is_drawn_whatever_the_noise() -> None:
    logits = torch.full((50, VOCAB), -math.inf)
    logits[:, 123] = 0.0
    sampler, state = make_sampler([{}] * 50)
    for position in range(20):
        assert sample(sampler, state, logits, positions=position).token_ids.tolist() == [123] * 50


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = make_logits(8) * 1000
    sampler, state = make_sampler([{"temperature": temperature}] * 8)
    assert torch.equal(sample(sampler, state, logits).token_ids, logits.argmax(-1))


# What is drawn


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    logits = make_logits(1, 3, 200)[0]
    counts = draw(logits, 20_000, temperature=temperature)
    assert_drawn_from(counts, (logits.double() / temperature).softmax(-1))


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_frequencies_along_each_axis_alone(axis: str) -> None:
    """Only one of seed, choice and position varies: each alone has to bring the whole distribution."""
    logits = make_logits(1, 4, 100)[0]
    num_draws = 128 if axis == "choice" else 6000
    state = SamplingState(max_num_seqs=num_draws, vocab_size=100, device="cpu")
    for slot in range(num_draws):
        seed, choice = (slot if axis == "seed" else 9), (slot if axis == "choice" else 0)
        give_slot(state, slot, choice, seed=seed)
    positions = list(range(num_draws)) if axis == "position" else [60] * num_draws
    sampled = sample(Sampler(state), state, logits.expand(num_draws, -1), positions=positions)
    assert_drawn_from(Counter(sampled.token_ids.tolist()), logits.double().softmax(-1))


@pytest.mark.parametrize(
    ("row", "warpers"),
    [
        ({"top_k": 10}, [TopKLogitsWarper(10)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"typical_p": 0.7}, [TypicalLogitsWarper(0.7)]),
        (
            {"temperature": 1.5, "min_p": 0.02, "typical_p": 0.95, "top_k": 20, "top_p": 0.9},
            [
                TemperatureLogitsWarper(1.5),
                MinPLogitsWarper(0.02),
                TypicalLogitsWarper(0.95),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
            ],
        ),
        (
            {"repetition_penalty": 1.5, "temperature": 0.8, "top_p": 0.9},
            [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_frequencies_are_those_of_transformers_processors(row: dict[str, Any], warpers: list[LogitsProcessor]) -> None:
    logits = make_logits(1, 5, 300)[0]
    logits[[1, 9]] = torch.tensor([5.0, 6.0])
    num_draws = 10_000
    state = SamplingState(max_num_seqs=num_draws, vocab_size=300, device="cpu")
    for slot in range(num_draws):
        state.set_slot(slot, SamplingParams(max_tokens=100, seed=slot, **row), 0, (1, 2, 3), (), EOS)
    counts = Counter(sample(Sampler(state), state, logits.expand(num_draws, -1)).token_ids.tolist())
    expected = LogitsProcessorList(warpers)(torch.LongTensor([[1, 2, 3]]), torch.FloatTensor(logits[None].clone()))
    assert_drawn_from(counts, expected[0].double().softmax(-1))


def test_top_k_of_one_is_greedy() -> None:
    logits = make_logits(16)
    sampler, state = make_sampler([{"top_k": 1}] * 16)
    assert torch.equal(sample(sampler, state, logits).token_ids, logits.argmax(-1))


# Bias, penalties, masks: seen through greedy rows, whose logits can be worked out by hand


def greedy_after(logits: Tensor, **row: Any) -> int:
    sampler, state = make_sampler([{"temperature": 0, **row}])
    return int(sample(sampler, state, logits[None]).token_ids[0])


def test_logit_bias_is_added_and_the_last_owners_is_gone() -> None:
    logits = torch.zeros(VOCAB)
    logits[5] = 2.0
    assert greedy_after(logits, logit_bias=((8, 2.5),)) == 8
    assert greedy_after(logits, logit_bias=((5, -100.0),)) == 0
    sampler, state = make_sampler([{"temperature": 0, "logit_bias": ((8, 2.5),)}] * 2)
    give_slot(state, 1, temperature=0)
    assert sample(sampler, state, logits.expand(2, -1)).token_ids.tolist() == [8, 5]


def test_repetition_penalty_is_transformers() -> None:
    logits = make_logits(1)[0]
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.LongTensor([[*PROMPT, *OUTPUT]]), torch.FloatTensor(logits[None].clone())
    )
    sampler, state = make_sampler([{"temperature": 0, "repetition_penalty": 1.7}])
    for token_id in {*PROMPT, *OUTPUT}:
        # The token against a rival a hair below and a hair above what it should be.
        for rival, winner in ((-1e-5, token_id), (1e-5, 600)):
            row = torch.full((VOCAB,), -math.inf)
            row[token_id], row[600] = logits[token_id], penalised[0, token_id] + rival
            give_slot(state, 0, temperature=0, repetition_penalty=1.7)
            assert sample(sampler, state, row[None]).token_ids.tolist() == [winner]


@pytest.mark.parametrize(
    ("token_id", "lost"),
    [
        (7, 0.5 + 2 * 0.25),
        (9, 0.5 + 0.25),
        (1, 0.0),
        (8, 0.0),
    ],  # twice and once in the output; in the prompt only; nowhere
)
def test_presence_and_frequency_count_the_output_only(token_id: int, lost: float) -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[token_id], logits[600] = 3.0, 3.0 - lost - 0.01
    assert greedy_after(logits, presence_penalty=0.5, frequency_penalty=0.25) == token_id
    logits[600] = 3.0 - lost + 0.01
    assert greedy_after(logits, presence_penalty=0.5, frequency_penalty=0.25) == 600


def test_a_sampled_token_counts_at_the_next_step() -> None:
    logits = torch.zeros(VOCAB)
    logits[20], logits[30], logits[40] = 1.0, 0.9, 0.8
    sampler, state = make_sampler([{"temperature": 0, "frequency_penalty": 0.15}])
    seen = [int(sample(sampler, state, logits[None], positions=7 + i).token_ids[0]) for i in range(5)]
    assert seen == [20, 30, 20, 40, 30]


def test_min_tokens_holds_back_every_end_until_they_are_there() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [0, 4, 8]] = torch.tensor([9.0, 8.0, 7.0])
    sampler, state = make_sampler([{"temperature": 0, "min_tokens": 6, "stop_token_ids": (4,)}])
    # Four tokens of prompt: the token at position p is output number p - 4.
    drawn = [int(sample(sampler, state, logits, positions=position).token_ids[0]) for position in (7, 9, 10, 11)]
    assert drawn == [8, 8, 0, 0]


@pytest.mark.parametrize("row", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.9}])
def test_grammar_mask_allows_only_its_bits(row: dict[str, Any]) -> None:
    allowed = [{0, 31, 32}, {996}, set(range(VOCAB)), {5, 63, 64, 700}]
    mask = torch.zeros(4, (VOCAB + 31) // 32, dtype=torch.int32)
    for i, token_ids in enumerate(allowed):
        for token_id in sorted(token_ids):
            mask[i, token_id // 32] |= (1 << token_id % 32) - (2**32 if token_id % 32 == 31 else 0)
    sampler, state = make_sampler([{**row, "has_grammar": i != 2} for i in range(4)])
    logits = make_logits(4)
    for position in range(20):
        sampled = sample(sampler, state, logits, positions=position, grammar_mask=mask).token_ids.tolist()
        assert all(token_id in allowed[i] for i, token_id in enumerate(sampled))
        assert sample(sampler, state, logits[2:3], [2], position).token_ids[0] == sampled[2]


@pytest.mark.parametrize("row", [{"temperature": 0}, {}, {"top_p": 0.9}])
def test_masks_stay_with_their_rows_and_change_no_others(row: dict[str, Any]) -> None:
    """Also where the rows are put into another order."""
    rows = [{**row, "has_grammar": i % 3 == 0, "top_k": i} for i in range(7)]
    sampler, state = make_sampler(rows)
    mask = torch.full((7, (VOCAB + 31) // 32), -1, dtype=torch.int32)
    mask[::3] = 0
    mask[::3, 2] = 1 << 5  # token 69
    logits = make_logits(7)
    free, free_state = make_sampler([{**each, "has_grammar": False} for each in rows])
    expected = sample(free, free_state, logits).token_ids.tolist()
    found = sample(sampler, state, logits, grammar_mask=mask).token_ids.tolist()
    assert found == [69 if i % 3 == 0 else expected[i] for i in range(7)]


def test_operations_come_in_their_order() -> None:
    """Bias before the penalty that divides; the penalty before top_k; temperature before top_p."""
    logits = torch.full((VOCAB,), -10.0)
    logits[[7, 600]] = torch.tensor([2.0, 3.0])
    # (2 + 4) / 1.5 = 4 beats 3.5; 2 / 1.5 + 4 > 5 would beat 4.5 too.
    biased: dict[str, Any] = {"logit_bias": ((7, 4.0),), "repetition_penalty": 1.5, "top_k": 1}
    assert greedy_after(logits.index_fill(0, torch.tensor([600]), 3.5), **biased) == 7
    assert greedy_after(logits.index_fill(0, torch.tensor([600]), 4.5), **biased) == 600
    assert set(draw(logits.index_fill(0, torch.tensor([600]), 4.5), 50, **biased)) == {600}
    # Of 0.73 : 0.27 one token makes 0.7 of the mass; at temperature 2 (0.62 : 0.38) it takes both.
    two = torch.tensor([1.0, 0.0])
    assert set(draw(two, 500, top_p=0.7)) == {0}
    assert set(draw(two, 500, top_p=0.7, temperature=2.0)) == {0, 1}


# Log-probabilities


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    rows: list[dict[str, Any]] = [
        {"temperature": 0, "logit_bias": ((5, 100.0),), "logprobs": 0},
        {"temperature": 0.1},
        {"temperature": 0.1, "top_p": 0.1, "logprobs": 4},
    ]
    logits = make_logits(3)
    sampler, state = make_sampler(rows)
    sampled = sample(sampler, state, logits)
    expected = logits.double().log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.token_ids[0] == 5
    for row in (0, 2):
        assert sampled.logprobs.chosen[row].item() == pytest.approx(
            expected[row, sampled.token_ids[row]].item(), rel=1e-5
        )
        best = expected[row].topk(MAX_LOGPROBS)
        assert torch.equal(sampled.logprobs.top_ids[row], best.indices)
        assert torch.allclose(sampled.logprobs.top[row].double(), best.values, atol=1e-5)
    assert sampled.logprobs.top_ids.shape == (3, MAX_LOGPROBS)


def test_equal_logprobs_are_listed_by_token_id() -> None:
    logits = torch.zeros(1, 10)
    logits[0, [2, 6, 4]] = 1.0
    sampler, state = make_sampler([{"temperature": 0, "logprobs": 5}], 10)
    sampled = sample(sampler, state, logits)
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_ids.tolist() == [[2, 4, 6, 0, 1, 3, 5, 7, 8, 9]]


def test_nobody_asks_nothing_is_computed() -> None:
    sampler, state = make_sampler([{}])
    assert sample(sampler, state, make_logits(1)).logprobs is None
