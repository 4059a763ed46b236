"""Is a lane exact for this model? Asked at load, of the real weights.

A model may do something in its attention or its layers that a lane does not see (state carried from token to token, a
mask of its own, a batch-wide choice): the answer would be silently wrong. So three random prompts are run alone through
the stock forward, and chunked and mixed through the lane; the logits of every token are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import NewSequence
from lmserve.runtime.lane import Lane
from lmserve.runtime.packed_lane import PackedBatch
from lmserve.sampling_params import SamplingParams

PROMPT_LENGTHS = (23, 9, 14)
LONGEST_WINDOW = 256
"""A sliding window, or what recurrent layers compute at once, up to here is crossed by the first prompt; a longer one
would make the check slow on a CPU."""
CHUNK_SIZES = ("chunk_size", "mamba_chunk_size", "block_size")
"""Under which configurations say how many tokens recurrent layers compute at once."""
USUAL_CHUNK = 64
"""Where it is not said (gated delta rules)."""
DECODES = 4
"""Tokens of each prompt that come one by one where chunks are computed in turn."""
PACKED, CHUNKED, WHOLE = "packed", "chunked", "whole"
"""How prompts are cut: packed side by side, in turn, in turn and not cut at all."""
Steps = list[list[tuple[int, int]]]
"""(prompt, tokens) of each step."""

# Mean difference of the logits in units of their spread. Rounding alone was seen to give 1e-6 in float32 and up to 0.03
# in bfloat16; a layer that attends wrongly gives 0.1 to 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}
ROUNDED = 0.08
"""Of a checkpoint that stays quantized. Many of those round activations to 8 bits, too: what differs in its last bit
may be rounded the other way, and differs by a hundredth then."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``error`` is the mean absolute difference over the standard deviation of the stock logits; worst prompt."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def check_lane(
    lane: Lane, vocab_size: int, block_size: int, max_tokens: int, dtype: torch.dtype, manner: str = PACKED
) -> CheckResult:
    """Compares. The lane has its memory; blocks from 0 on are overwritten, and what it holds of slots 0 to 2.

    Args:
        max_tokens: of the first prompt.
        manner: ``PACKED``, ``CHUNKED`` or ``WHOLE``.

    Raises:
        ModelLoadFailed: the stock forward itself cannot run.
    """
    device = lane.model.device
    prompts = _prompts(vocab_size, _longest_prompt(lane.model.config.get_text_config(), max_tokens, manner), device)
    try:
        with lane.stock_attention():
            stock = [lane.model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in prompts]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelLoadFailed(f"the model's own forward fails on a short prompt: {error}") from error
    served = _run(lane, prompts, block_size, _steps([len(prompt) for prompt in prompts], manner))
    errors = [((p - s).abs().mean() / s.std()).item() for p, s in zip(served, stock, strict=True)]
    rounds = getattr(lane.model, "is_quantized", False)
    return CheckResult(max(errors), max(TOLERANCE[dtype], ROUNDED if rounds else 0.0))


def tokens_to_check(text_config: Any, manner: str) -> int:
    """That a cache has to have room for, if all that matters is to be compared."""
    return 3 * (_longest_prompt(text_config, 2 * LONGEST_WINDOW + 64, manner) + 64)


def _longest_prompt(text_config: Any, max_tokens: int, manner: str) -> int:
    window = getattr(text_config, "sliding_window", None)
    wanted = window + 8 if isinstance(window, int) and window <= LONGEST_WINDOW else 0
    if manner != PACKED:
        sizes = [getattr(text_config, name, None) for name in CHUNK_SIZES]
        chunk = max([size for size in sizes if isinstance(size, int)], default=USUAL_CHUNK)
        wanted = max(wanted, 2 * (min(chunk, LONGEST_WINDOW) + 6) + DECODES)  # two, and none of them whole
    longest = getattr(text_config, "max_position_embeddings", None)
    limit = longest if isinstance(longest, int) and longest > 0 else max_tokens
    return max(PROMPT_LENGTHS[0], min(wanted, max_tokens, limit))


def _steps(lengths: list[int], manner: str) -> Steps:
    """Three prompts through each other, and in the end side by side."""
    a, b, c = lengths
    if manner == PACKED:
        return [[(0, 11), (1, 7)], [(0, 8), (1, 1), (2, 10)], [(0, a - 19), (1, b - 8), (2, c - 10)]]
    one_by_one = [[(0, 1), (1, 1), (2, 1)], [(0, 1), (2, 1)], [(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 1), (2, 1)]]
    a, b, c = a - DECODES, b - DECODES + 1, c - DECODES
    if manner == WHOLE:
        return [[(0, a)], [(1, b), (2, c)], *one_by_one]
    half = a // 2
    return [[(0, half), (1, 3)], [(1, 1), (0, a - half), (2, c)], [(1, b - 4)], *one_by_one]


def _prompts(vocab_size: int, longest: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (longest, *PROMPT_LENGTHS[1:])
    return [torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in lengths]


def _run(lane: Lane, prompts: list[Tensor], block_size: int, steps: Steps) -> list[Tensor]:
    """Every prompt's logits, (tokens, vocab) float32, from a few mixed steps over interleaved blocks."""
    tables = [
        [i + len(prompts) * j for j in range(-(-prompt.numel() // block_size))] for i, prompt in enumerate(prompts)
    ]
    done = [0] * len(prompts)
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    for takes in steps:
        spans, ids, positions, slots, row = [], [], [], [], 0
        for i, n in takes:
            where = torch.arange(done[i], done[i] + n, device=prompts[i].device)
            table = torch.tensor(tables[i], device=where.device)
            ids.append(prompts[i][where])
            positions.append(where)
            slots.append(table[where // block_size] * block_size + where % block_size)
            spans.append(Span(row, n, done[i] + n, tables[i]))
            row += n
        rows = torch.arange(row, device=ids[0].device)
        lane.begin([_new_sequence(i, prompts[i]) for i, _ in takes if done[i] == 0])
        batch = PackedBatch(
            torch.cat(ids),
            torch.cat(positions),
            torch.cat(slots),
            rows,
            spans,
            slots=[i for i, _ in takes],
            saves=[()] * len(takes),
            wanted=range(row),
        )
        logits = lane.forward(batch).to(torch.float32, copy=True)
        for span, (i, n) in zip(spans, takes, strict=True):
            pieces[i].append(logits[span.row : span.row + n])
            done[i] += n
    return [torch.cat(parts) for parts in pieces]


def _new_sequence(slot: int, prompt: Tensor) -> NewSequence:
    return NewSequence(slot, tuple(prompt.tolist()), len(prompt), SamplingParams(max_tokens=1), 0)
