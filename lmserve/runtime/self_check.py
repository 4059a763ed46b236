"""Is the packed lane exact for this model? Asked once, at load, of the real weights.

A model may do something in its attention or its layers that a packed forward does not see (state carried from token to
token, a mask of its own, a batch-wide choice): the answer would be silently wrong. So three random prompts are run
alone through the stock forward, and packed, chunked and mixed through ours; the logits of every token are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import Span
from lmserve.runtime.packed_lane import PackedBatch, PackedLane

PROMPT_LENGTHS = (23, 9, 14)
LONGEST_WINDOW = 256
"""A sliding window up to here is crossed by the first prompt; a longer one would make the check slow on a CPU."""
STEPS = (((0, 11), (1, 7)), ((0, 8), (1, 1), (2, 10)), ((0, -1), (1, -1), (2, -1)))
"""(prompt, tokens) of each packed step; -1 is the rest."""

# Mean difference of the logits in units of their spread. Rounding alone was seen to give 1e-6 in float32 and up to 0.03
# in bfloat16; a layer that attends wrongly gives 0.1 to 1.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``error`` is the mean absolute difference over the standard deviation of the stock logits; worst prompt."""

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def check_packed_lane(
    lane: PackedLane, vocab_size: int, block_size: int, max_tokens: int, dtype: torch.dtype
) -> CheckResult:
    """Compares. The lane is attached; blocks from 0 on are overwritten.

    Raises:
        ModelLoadFailed: the stock forward itself cannot run.
    """
    device = lane.model.device
    prompts = _prompts(vocab_size, _longest_prompt(lane, max_tokens), device)
    try:
        with lane.stock_attention():
            stock = [lane.model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in prompts]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelLoadFailed(f"the model's own forward fails on a short prompt: {error}") from error
    packed = _run_packed(lane, prompts, block_size)
    errors = [((p - s).abs().mean() / s.std()).item() for p, s in zip(packed, stock, strict=True)]
    return CheckResult(max(errors), TOLERANCE[dtype])


def _longest_prompt(lane: PackedLane, max_tokens: int) -> int:
    window = getattr(lane.model.config.get_text_config(), "sliding_window", None)
    wanted = window + 8 if isinstance(window, int) and window <= LONGEST_WINDOW else 0
    return max(PROMPT_LENGTHS[0], min(wanted, max_tokens))


def _prompts(vocab_size: int, longest: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (longest, *PROMPT_LENGTHS[1:])
    return [torch.randint(0, vocab_size, (n,), generator=generator).to(device) for n in lengths]


def _run_packed(lane: PackedLane, prompts: list[Tensor], block_size: int) -> list[Tensor]:
    """Every prompt's logits, (tokens, vocab) float32, from a few mixed steps over interleaved blocks."""
    tables = [
        [i + len(prompts) * j for j in range(-(-prompt.numel() // block_size))] for i, prompt in enumerate(prompts)
    ]
    done = [0] * len(prompts)
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    for takes in STEPS:
        counts = [(i, prompts[i].numel() - done[i] if n < 0 else n) for i, n in takes]
        spans, ids, positions, slots, row = [], [], [], [], 0
        for i, n in counts:
            where = torch.arange(done[i], done[i] + n, device=prompts[i].device)
            table = torch.tensor(tables[i], device=where.device)
            ids.append(prompts[i][where])
            positions.append(where)
            slots.append(table[where // block_size] * block_size + where % block_size)
            spans.append(Span(row, n, done[i] + n, tables[i]))
            row += n
        rows = torch.arange(row, device=ids[0].device)
        logits = lane.forward(PackedBatch(torch.cat(ids), torch.cat(positions), torch.cat(slots), rows, spans))
        logits = logits.to(torch.float32, copy=True)
        for span, (i, n) in zip(spans, counts, strict=True):
            pieces[i].append(logits[span.row : span.row + n])
            done[i] += n
    return [torch.cat(parts) for parts in pieces]
