"""Samplers and rows that the sampler's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmserve.runtime.sampler import SampledTokens, Sampler
from lmserve.runtime.sampling_state import SamplingState
from lmserve.sampling_params import SamplingParams

VOCAB = 997  # not a multiple of any vector's width
PROMPT, OUTPUT, EOS = (1, 2, 3, 500), (7, 7, 9), (0,)

# Every parameter alone, several together, and rows that have nothing in common.
MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0, "logit_bias": ((3, 4.0), (996, -100.0))},
    {"temperature": 0, "min_tokens": 20, "logprobs": 5},
    {},
    {"temperature": 0.7},
    {"temperature": 1e-5},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 700, "top_p": 0.99},
    {"top_k": 40, "top_p": 0.8, "logprobs": 0},
    {"min_p": 0.05},
    {"min_p": 0.01, "top_k": 50, "top_p": 0.95, "temperature": 1.3},
    {"typical_p": 0.9},
    {"typical_p": 0.5, "top_p": 0.9},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -2.0, "top_p": 0.95},
    {"logit_bias": ((5, 100.0),)},
    {"logit_bias": tuple((i, 0.5) for i in range(100)), "min_tokens": 30},
    {"min_tokens": 50, "stop_token_ids": (4, 8, 15)},
    {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.02,
        "typical_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": ((8, -3.0),),
        "logprobs": 20,
        "min_tokens": 10,
    },
]
MIXED = [*MIXED, *({**row, "temperature": 1.1} for row in MIXED[:8])]
assert len(MIXED) == 32


def make_sampler(rows: list[dict[str, Any]], vocab_size: int = VOCAB) -> tuple[Sampler, SamplingState]:
    """A sampler whose slot i belongs to ``rows[i]``, each with its own seed unless it has one."""
    state = SamplingState(max_num_seqs=max(1, len(rows)), vocab_size=vocab_size, device="cpu")
    for slot, row in enumerate(rows):
        give_slot(state, slot, **{"seed": slot, **row})
    return Sampler(state), state


def give_slot(
    state: SamplingState,
    slot: int,
    choice: int = 0,
    output: tuple[int, ...] = OUTPUT,
    *,
    has_grammar: bool = False,
    **row: Any,
) -> None:
    params = SamplingParams(max_tokens=100, **row)
    state.set_slot(slot, params, choice, PROMPT, output, EOS, has_grammar=has_grammar)


def sample(
    sampler: Sampler,
    state: SamplingState,
    logits: Tensor,
    slots: list[int] | None = None,
    positions: int | list[int] = 7,
    grammar_mask: Tensor | None = None,
) -> SampledTokens:
    slots = list(range(len(logits))) if slots is None else slots
    where = torch.tensor([positions] * len(slots) if isinstance(positions, int) else positions)
    return sampler(logits, torch.tensor(slots), where, state.flags(slots), grammar_mask)


def make_logits(rows: int, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
