"""Which tokens may be drawn: min_p, typical_p, top_k and top_p.

A filter takes probabilities in which earlier filters have put zeros and gives back (rows, 1) thresholds: a token
stays if its probability is at least that much. So equally likely tokens stay or go together, whatever their ids, and
nothing hangs on how a sort breaks ties. The definitions are those of transformers' logits warpers; where these break a
tie at the border of top_p by chance, all its tokens stay, as they do there for the three others.

Nothing is normalised again between the filters: a filter that needs the remaining mass compares with it. Sums that
decide a border are of integers: they have the same value in any order, on any device and beside any other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONE = 0x3F800000  # the bits of 1.0; the bits of positive floats are ordered as the floats are
_DIGIT = 15
BUCKETS = 1 << _DIGIT
"""Integers a row that top_p needs for its histogram, whatever the vocabulary."""
_MASS_UNIT = 2.0**40  # 24 bits more than a float32 probability of 2**-16 has; a row's sum stays far below 2**63


def min_p_threshold(probs: Tensor, min_p: Tensor) -> Tensor:
    """Tokens at least ``min_p`` times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    return probs.amax(-1, keepdim=True) * min_p


def top_k_threshold(probs: Tensor, top_k: Tensor, max_top_k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, and those as likely as the k-th.

    Args:
        top_k: (rows, 1) int64; over ``max_top_k`` is off.
        max_top_k: the largest k that is not off, known on the host.
    Returns:
        The thresholds, and (rows, max_top_k) the likeliest probabilities that stay, best first, then zeros.
    """
    best = probs.topk(max_top_k, dim=-1).values
    kth = best.gather(-1, (top_k - 1).clamp_max(max_top_k - 1))
    best.masked_fill_(best < kth, 0.0)
    return kth.masked_fill_(top_k > max_top_k, 0.0), best


def top_p_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """The fewest tokens, likeliest first, that hold ``top_p`` of the mass (Holtzman et al. 2019, arXiv 1904.09751).

    Not by sorting: the border is found digit by digit in the 30 bits of the float, first the upper 15, then the lower
    15 of those at the border, each time from a histogram of mass (radix selection). A tenth of a sort's time on a CPU.
    """
    mass = (probs * _MASS_UNIT).to(torch.int64)
    limit = _limit(mass, top_p)
    distance = (_ONE - probs.view(torch.int32)).clamp_(0, _ONE)  # a row of NaN must not index past the histogram
    upper = _border(distance >> _DIGIT, mass, limit, BUCKETS)
    # Bucket 0 takes all that is likelier than the border's bucket, the last one all that is less likely.
    lower = (distance - (upper << _DIGIT)).clamp_(-1, BUCKETS).add_(1)
    exact = (upper << _DIGIT) + _border(lower, mass, limit, BUCKETS + 2) - 1
    return (_ONE - exact).view(torch.float32).masked_fill_(top_p >= 1, 0.0)


def top_p_threshold_of_k(best: Tensor, probs: Tensor, top_p: Tensor) -> Tensor:
    """The same threshold for rows that ``top_k_threshold`` has cut: it looks at k tokens instead of all.

    Args:
        best: (rows, k) probabilities as ``top_k_threshold`` gives them.
        probs: (rows, vocab) after its cut: the mass is theirs, as tokens that tie with the k-th can miss in ``best``.
    """
    limit = _limit((probs * _MASS_UNIT).to(torch.int64), top_p)
    mass = (best * _MASS_UNIT).to(torch.int64)
    # Past the end: what is missing belongs to tokens as likely as the last.
    border = torch.searchsorted(mass.cumsum_(-1), limit).clamp_max_(best.shape[-1] - 1)
    return best.gather(-1, border).masked_fill_(top_p >= 1, 0.0)


def drop_atypical(probs: Tensor, typical_p: Tensor) -> None:
    """Keeps the tokens whose surprise is closest to the entropy, up to ``typical_p`` of the mass, zeros the others.

    The one filter without a threshold on the probability: the likeliest may go (Meister et al. 2022, arXiv 2202.00666).
    """
    # The last of a running sum, as a plain sum of one row alone is split among threads and then rounds differently.
    share = probs / probs.cumsum(-1)[:, -1:]
    entropy = torch.special.entr(share).cumsum(-1)[:, -1:]
    surprise = (share.log() + entropy).abs_()
    ordered, order = surprise.sort(dim=-1, stable=True)
    border = torch.searchsorted(share.gather(-1, order).cumsum_(-1), typical_p)
    border = ordered.gather(-1, border.clamp_max_(probs.shape[-1] - 1))
    probs.masked_fill_((surprise > border) & (typical_p < 1), 0.0)


def _limit(mass: Tensor, top_p: Tensor) -> Tensor:
    """(rows, 1) int64 in [1, total mass]: float32 may round past either end."""
    total = mass.sum(-1, keepdim=True)
    return torch.minimum((total.to(torch.float32) * top_p).to(torch.int64).clamp_min_(1), total)


def _border(digits: Tensor, mass: Tensor, limit: Tensor, num_digits: int) -> Tensor:
    """(rows, 1) int32: the digit, counted from the likeliest, at which the running mass reaches ``limit``."""
    histogram = mass.new_zeros(mass.shape[0], num_digits).scatter_add_(-1, digits.to(torch.int64), mass)
    return torch.searchsorted(histogram.cumsum_(-1), limit, out_int32=True).clamp_max_(num_digits - 1)
