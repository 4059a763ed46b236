"""Log-probabilities of the logits as the model gave them, and the likeliest tokens in an order that is always the same.

Everything is row by row: neither the other rows of a batch nor the number of likeliest tokens that anyone asked for
changes a value or the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmserve.outputs import TokenLogprobs
from lmserve.sampling_params import MAX_LOGPROBS

_SLICE_ELEMENTS = 1 << 22
"""Logits that are brought to float32 at once, 16 MiB: a prompt may have hundreds of rows, each as wide as the
vocabulary, and there are several such copies."""


@dataclass(frozen=True, slots=True)
class RankedLogprobs:
    """Of R rows, still on the device.

    Attributes:
        chosen: (R,) float32, that of each row's given token.
        top_ids, top: (R, MAX_LOGPROBS) int64 and float32, of the likeliest tokens, best first, equal ones by token id;
            fewer columns in a smaller vocabulary.
    """

    chosen: Tensor
    top_ids: Tensor
    top: Tensor

    def to_host(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """One entry for each row, row i with the ``num_top[i]`` likeliest tokens. Waits for the device."""
        rows = zip(self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist(), num_top, strict=True)
        return [
            TokenLogprobs(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
            for chosen, ids, values, count in rows
        ]


def rank_logprobs(logits: Tensor, rows: Tensor, token_ids: Tensor) -> RankedLogprobs:
    """The log-probabilities of some rows, a slice of them at a time.

    Args:
        logits: (any, vocab) float32, bfloat16 or float16; left as it is.
        rows: (R,) int64, on the device, at least one.
        token_ids: (R,) int64, on the device: each row's given token; a negative one counts as token 0.
    """
    given = token_ids.clamp_min(0)
    num_rows = max(1, _SLICE_ELEMENTS // logits.shape[-1])
    slices = [
        _rank(logits.index_select(0, rows[start : start + num_rows]), given[start : start + num_rows])
        for start in range(0, rows.shape[0], num_rows)
    ]
    return RankedLogprobs(*(torch.cat(parts) for parts in zip(*slices, strict=True)))


def _rank(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.to(torch.float32).log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
    # Always as many as anyone may ask for, so that equal ones at the border do not depend on the batch.
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]), dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return chosen, ids.gather(-1, by_value), values
