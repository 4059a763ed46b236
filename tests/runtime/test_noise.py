"""The noise is checked against plain Python integers for its bits, and by statistics for what it is used for.

All inputs are fixed, so the statistics have fixed values: the bounds say how unlikely true randomness would find them.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmserve.runtime.noise import noise_bits, request_key, row_keys, token_keys, unit_exponential

M32, M64 = 2**32 - 1, 2**64 - 1
VOCAB = 4096
NUM_KEYS = 2048


def bits_of(keys: Tensor, tokens: Tensor) -> Tensor:
    out = torch.empty(keys.shape[0], tokens.shape[-1], dtype=torch.int32, device=keys.device)
    noise_bits(keys, tokens, out=out, scratch=torch.empty_like(out))
    return out


def keys_of(seeds: list[int], choices: list[int], positions: list[int]) -> Tensor:
    halves = [request_key(seed, choice) for seed, choice in zip(seeds, choices, strict=True)]
    return row_keys(torch.tensor(halves, dtype=torch.int32), torch.tensor(positions))


def keys_along(axis: str) -> Tensor:
    """Keys of neighbours: one of seed, choice and position counts up, the others stand still."""
    run, seed, choice, position = list(range(NUM_KEYS)), [11] * NUM_KEYS, [0] * NUM_KEYS, [140] * NUM_KEYS
    columns = {"seed": (run, choice, position), "choice": (seed, run, position), "position": (seed, choice, run)}
    return keys_of(*columns[axis])


def plain_finalise(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & M32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & M32
    return h ^ (h >> 16)


def plain_split_mix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def plain_fold(h: int, shift: int) -> int:
    """x ^ (x >> shift) with the sign brought in from the left."""
    return h ^ (((h | (M32 << 32)) >> shift) & M32 if h >> 31 else h >> shift)


def plain_bits(seed: int, choice: int, position: int, token_id: int) -> int:
    key = plain_split_mix(plain_split_mix(seed & M64) ^ choice)
    counter = (position * 0x9E3779B9) & M32
    first, second = plain_finalise((key & M32) ^ counter), plain_finalise((key >> 32) ^ counter) | 1
    h = ((plain_finalise((token_id + 1) * 0x9E3779B9 & M32) ^ first) * 0x7FEB352D) & M32
    return plain_fold((plain_fold(h, 16) * second) & M32, 15)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
@pytest.mark.parametrize(("choice", "position"), [(0, 0), (1, 7), (127, 131071)])
def test_bits_are_the_documented_hash(seed: int, choice: int, position: int) -> None:
    bits = bits_of(keys_of([seed], [choice], [position]), token_keys(50, "cpu"))
    assert bits[0].tolist() == [plain_bits(seed, choice, position, token_id) for token_id in range(50)]


def test_a_seed_keeps_its_meaning() -> None:
    """These numbers are a promise: changing them changes every seeded answer."""
    assert request_key(42, 0) == (1695576580, 1474427578)
    assert bits_of(keys_of([42], [3], [17]), token_keys(4, "cpu")).tolist() == [
        [15481478, 2058410941, 1735642176, 1214696636]
    ]


def test_any_subset_of_tokens_in_any_order_has_the_same_bits() -> None:
    keys, tokens = keys_of([1, 2], [0, 5], [10, 20]), token_keys(1000, "cpu")
    whole = bits_of(keys, tokens)
    some = torch.tensor([999, 3, 500, 3])
    assert torch.equal(bits_of(keys, tokens[some]), whole[:, some])
    assert torch.equal(bits_of(keys, tokens[some].expand(2, 4)), whole[:, some])
    assert torch.equal(bits_of(keys[1:], tokens), whole[1:])


def test_int64_and_int32_positions_are_the_same() -> None:
    halves = torch.tensor([request_key(5, 0)], dtype=torch.int32)
    assert torch.equal(row_keys(halves, torch.tensor([9])), row_keys(halves, torch.tensor([9], dtype=torch.int32)))


def test_exponentials_are_finite_and_positive_at_both_ends() -> None:
    bits = torch.tensor([0, 1, 2**30, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    e = unit_exponential(bits, out=torch.empty(5))
    expected = [-math.log1p(-(b + 0.5) / 2**31) for b in bits.tolist()]
    assert e[:3].tolist() == pytest.approx(expected[:3], rel=1e-6)
    assert bool((e[3:] > 16).all())
    assert bool(e.isfinite().all())


def test_an_element_has_the_same_bits_wherever_it_stands() -> None:
    """Vectorised loops have tails; a tail that rounds differently would make a token depend on its neighbours."""
    bits = bits_of(keys_of([3], [0], [4]), token_keys(70_001, "cpu"))[0]
    whole = unit_exponential(bits, out=torch.empty(70_001))
    for start, length in [(0, 1), (1, 15), (3, 17), (7, 1000), (17, 40_001), (70_000, 1)]:
        part = bits[start : start + length].clone()
        assert torch.equal(unit_exponential(part, out=torch.empty(length)), whole[start : start + length])


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_uniform_along_every_axis(axis: str) -> None:
    """Chi-square over 64 cells, once for each key (over tokens) and once for each token (over keys)."""
    cells = bits_of(keys_along(axis), token_keys(VOCAB, "cpu")) >> 25
    for sample in (cells, cells.T):
        num_series, length = sample.shape
        counts = torch.zeros(num_series, 64).scatter_add_(1, sample.long(), torch.ones(sample.shape))
        chi_square = (counts - length / 64).square().sum(1) / (length / 64)
        # Mean and variance of each are 63 and 126; the mean of thousands has a standard error below 0.3.
        assert chi_square.mean().item() == pytest.approx(63, abs=1.2)
        assert chi_square.var().item() == pytest.approx(126, rel=0.2)
        assert chi_square.max().item() < 140


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
@pytest.mark.parametrize("lag", [1, 2, 64])
@pytest.mark.parametrize("dim", [0, 1])
def test_neighbours_are_independent(axis: str, lag: int, dim: int) -> None:
    """Correlation of values and of single bits, and the joint cells, of neighbouring keys (0) and tokens (1)."""
    bits = bits_of(keys_along(axis)[:1024], token_keys(1024, "cpu"))
    one, other = (bits.narrow(dim, start, 1024 - lag).flatten() for start in (0, lag))
    u, v = one.double() / 2**31 - 0.5, other.double() / 2**31 - 0.5
    assert abs((u * v).mean().item()) * 12 * math.sqrt(len(u)) < 4.5
    differing = one ^ other
    shares = [(differing & (1 << bit) != 0).double().mean().item() for bit in range(31)]
    assert max(abs(share - 0.5) for share in shares) * 2 * math.sqrt(len(u)) < 4.5
    joint = torch.bincount((one >> 27) * 16 + (other >> 27), minlength=256).double()
    expected = len(u) / 256
    assert ((joint - expected).square() / expected).sum().item() < 255 + 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_no_two_rows_resemble_each_other(axis: str) -> None:
    u = bits_of(keys_along(axis), token_keys(VOCAB, "cpu")).double() / 2**31 - 0.5
    u /= u.norm(dim=1, keepdim=True)
    correlation = (u @ u.T).fill_diagonal_(0).abs().max().item()
    assert correlation * math.sqrt(VOCAB) < 6.5  # the largest of two million standard normal values is about 5.2


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_the_smallest_of_a_row_is_where_it_likes(axis: str) -> None:
    """The winner of a race between equals: uniform over tokens, and its time is exponential."""
    bits = bits_of(keys_along(axis), token_keys(VOCAB, "cpu"))
    counts = torch.bincount(bits.argmin(1) // 64, minlength=64).double()
    expected = NUM_KEYS / 64
    assert ((counts - expected).square() / expected).sum().item() < 63 + 4 * math.sqrt(126)
    smallest = unit_exponential(bits, out=torch.empty(bits.shape)).amin(1).double() * VOCAB
    assert smallest.mean().item() == pytest.approx(1, abs=4 / math.sqrt(NUM_KEYS))
    assert smallest.std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_are_equal_on_the_gpu() -> None:
    keys, tokens = keys_along("position"), token_keys(VOCAB, "cpu")
    assert torch.equal(token_keys(VOCAB, "cuda").cpu(), tokens)
    assert torch.equal(bits_of(keys.cuda(), tokens.cuda()).cpu(), bits_of(keys, tokens))
