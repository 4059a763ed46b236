"""Each filter against transformers' warper of the same name, and against brute force where ties matter."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from lmserve.runtime import filters

VOCAB = 1001


def make_logits(kind: str, seed: int, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, VOCAB, generator=generator)
    kinds: dict[str, Callable[[], Tensor]] = {
        "flat": lambda: normal * 0.01,
        "usual": lambda: normal * 3,
        "peaked": lambda: normal * 20,
        "masked": lambda: (normal * 3).masked_fill(normal > 0, -torch.inf),
    }
    return kinds[kind]()


def kept_by(warper: LogitsProcessor, logits: Tensor) -> Tensor:
    scores: Tensor = warper(torch.LongTensor([[0]]), torch.FloatTensor(logits))
    return scores > -torch.inf


def column(values: list[float]) -> Tensor:
    return torch.tensor(values)[:, None]


def brute_force_top_p(probs: list[float], top_p: float) -> set[int]:
    """The definition in exact arithmetic: equal ones together, until the mass is reached."""
    wanted, mass, kept = Fraction(top_p) * sum(map(Fraction, probs)), Fraction(0), set[int]()
    for level in sorted(set(probs), reverse=True):
        if mass >= wanted or level == 0:
            break
        same = {i for i, p in enumerate(probs) if p == level}
        kept |= same
        mass += len(same) * Fraction(level)
    return kept


all_kinds = pytest.mark.parametrize("kind", ["flat", "usual", "peaked", "masked"])


@all_kinds
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_is_transformers(kind: str, min_p: float) -> None:
    logits = make_logits(kind, 1)
    probs = logits.softmax(-1)
    kept = probs >= filters.min_p_threshold(probs, column([min_p] * len(probs)))
    expected = kept_by(MinPLogitsWarper(min_p), logits)
    assert torch.equal(kept, expected)


@all_kinds
@pytest.mark.parametrize("top_k", [1, 2, 40, 300])
def test_top_k_is_transformers(kind: str, top_k: int) -> None:
    logits = make_logits(kind, 2)
    probs = logits.softmax(-1)
    threshold, best = filters.top_k_threshold(probs, torch.full((len(probs), 1), top_k), max_top_k=350)
    expected = kept_by(TopKLogitsWarper(top_k), logits)
    # A probability that underflows to 0 cannot be drawn, kept or not.
    assert torch.equal((probs >= threshold) & (probs > 0), expected & (probs > 0))
    assert torch.equal((best > 0).sum(-1), (expected & (probs > 0)).sum(-1))


def test_top_k_keeps_all_that_tie_with_the_last_and_lets_rows_without_it_be() -> None:
    probs = torch.tensor([[0.1, 0.3, 0.1, 0.1, 0.4], [0.1, 0.3, 0.1, 0.1, 0.4], [0.1, 0.3, 0.1, 0.1, 0.4]])
    threshold, best = filters.top_k_threshold(probs, torch.tensor([[3], [1], [5]]), max_top_k=3)
    assert (probs >= threshold).tolist() == [[True] * 5, [False] * 4 + [True], [True] * 5]
    assert best.tolist() == [pytest.approx(row) for row in ([0.4, 0.3, 0.1], [0.4, 0, 0], [0.4, 0.3, 0.1])]


@all_kinds
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_top_p_is_transformers(kind: str, top_p: float) -> None:
    logits = make_logits(kind, 3)
    probs = logits.softmax(-1)
    kept = probs >= filters.top_p_threshold(probs, column([top_p] * len(probs)))
    expected = kept_by(TopPLogitsWarper(top_p), logits)
    assert torch.equal(kept & (probs > 0), expected & (probs > 0))


# Multiples of 1/64 make ties and are exact in the integers that the filter adds up.
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 64), min_size=2, max_size=40).filter(lambda weights: sum(weights) > 0),
    st.sampled_from([1 / 64, 0.25, 0.5, 0.75, 0.9375, 63 / 64]),
)
def test_top_p_by_brute_force(weights: list[int], top_p: float) -> None:
    scale = 1 << sum(weights).bit_length()
    values = [weight / scale for weight in weights]
    probs = torch.tensor([values])
    kept = (probs >= filters.top_p_threshold(probs, column([top_p])))[0]
    assert set(kept.nonzero().flatten().tolist()) == brute_force_top_p(values, top_p)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=40).filter(any),
    st.integers(1, 40),
    st.sampled_from([1e-9, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]),
)
def test_top_p_of_k_is_top_p_after_top_k(weights: list[int], top_k: int, top_p: float) -> None:
    """With ties at the border of k in most examples: looking at k tokens only must not show."""
    probs = torch.tensor([weights], dtype=torch.float32)
    probs /= probs.sum()
    max_top_k = min(top_k, len(weights) - 1)
    threshold, best = filters.top_k_threshold(probs, torch.tensor([[top_k]]), max_top_k)
    left = probs.masked_fill(probs < threshold, 0)
    if top_k <= max_top_k:
        of_k = filters.top_p_threshold_of_k(best, left, column([top_p]))
        of_all = filters.top_p_threshold(left, column([top_p]))
        assert torch.equal((left >= of_k) & (left > 0), (left >= of_all) & (left > 0))


@pytest.mark.parametrize("top_p", [1e-45, 1e-15, 0.5, 1 - 2.0**-24, 1.0])
def test_top_p_at_its_ends(top_p: float) -> None:
    """Never nothing; and a row that has it off keeps everything, down to the smallest positive number."""
    rows = torch.zeros(4, VOCAB)
    rows[0, 5] = 1.0  # certainty
    rows[1] = 1 / VOCAB  # all the same
    rows[2] = torch.softmax(torch.linspace(0, -80, VOCAB), 0)  # spans the exponents
    rows[3] = torch.tensor([0.5, 0.5] + [1e-38] * (VOCAB - 2))
    kept = rows >= filters.top_p_threshold(rows, column([top_p] * 4))
    assert bool(kept.any(-1).all())
    assert kept[0, 5]
    assert kept[1].all()
    assert kept[3, :2].all()
    if top_p == 1.0:
        assert torch.equal(kept, torch.ones_like(kept))
    elif top_p == 0.5:
        assert kept.sum(-1).tolist()[2:] == [len(brute_force_top_p(rows[2].tolist(), 0.5)), 2]


@pytest.mark.parametrize("kind", ["flat", "usual", "masked"])
@pytest.mark.parametrize("typical_p", [0.1, 0.5, 0.9, 0.99])
def test_typical_p_is_transformers(kind: str, typical_p: float) -> None:
    logits = make_logits(kind, 4)
    probs = logits.softmax(-1)
    filters.drop_atypical(probs, column([typical_p] * len(probs)))
    expected = kept_by(TypicalLogitsWarper(typical_p), logits)
    # The entropies differ in their last bits: a token whose surprise is within that of the border may go either way.
    assert (probs > 0).ne(expected).sum().item() <= (0 if kind != "flat" else 4)
    assert bool((probs > 0).any(-1).all())


def test_typical_p_can_drop_the_likeliest_and_is_off_at_one() -> None:
    likely = torch.tensor([0.4] + [0.006] * 100)
    tail = torch.softmax(torch.linspace(0, -80, 101), 0)  # the running sum is 1 in float32 long before its end
    probs = torch.stack([likely, tail])
    filters.drop_atypical(probs, column([0.3, 1.0]))
    assert probs[0, 0] == 0
    assert torch.equal(probs[1], tail)


def test_typical_p_is_of_what_earlier_filters_left() -> None:
    logits = make_logits("usual", 6)
    probs = logits.softmax(-1)
    left = probs < probs.amax(-1, keepdim=True) * 0.2  # without the likeliest, and so without most of the mass
    expected = kept_by(TypicalLogitsWarper(0.5), logits.masked_fill(~left, -torch.inf))
    probs = probs.masked_fill(~left, 0.0)
    filters.drop_atypical(probs, column([0.5] * len(probs)))
    assert torch.equal(probs > 0, expected)


def test_rows_of_nan_do_no_harm() -> None:
    probs = torch.full((1, VOCAB), torch.nan)
    filters.top_p_threshold(probs, column([0.9]))
    _, best = filters.top_k_threshold(probs, torch.tensor([[5]]), 5)
    filters.top_p_threshold_of_k(best, probs, column([0.9]))
    filters.drop_atypical(probs, column([0.9]))


def test_thresholds_do_not_depend_on_the_batch() -> None:
    probs = torch.cat([make_logits(kind, 5) for kind in ("flat", "usual", "peaked")]).softmax(-1)
    top_p = column([0.1 + 0.05 * i for i in range(len(probs))])
    together = filters.top_p_threshold(probs, top_p)
    dropped = probs.clone()
    filters.drop_atypical(dropped, top_p)
    for i in range(len(probs)):
        alone = probs[i : i + 1].clone()
        assert torch.equal(filters.top_p_threshold(alone, top_p[i : i + 1]), together[i : i + 1])
        filters.drop_atypical(alone, top_p[i : i + 1])
        assert torch.equal(alone, dropped[i : i + 1])
