"""Sampling noise from a counter: a hash of (seed, choice, position, token id), never a stream.

The draw is the exponential race (equal in law to Gumbel-argmax): token i wins with probability p_i when the E_i are
independent unit exponentials and the smallest E_i / p_i takes it. Because E_i is a pure function of what it is for, it
can be evaluated anywhere, in any order, for any subset: a token does not depend on who else is in the batch.

Hashing is split by how often it has to be done, all in 32-bit integers that wrap, equal on every device:
  once a request        (seed, choice)      -> 64 bits, SplitMix64 (Steele, Lea, Flood 2014), on the host
  once a row and step   ... and position    -> two 32-bit row keys, MurmurHash3's finaliser (Appleby)
  once a vocabulary     token id            -> one 32-bit token key, the same finaliser
  every element         row keys, token key -> 31 bits: xor, multiply, fold, multiply, fold
torch has no unsigned 32-bit arithmetic, so its right shift brings in the sign. In the last two folds that is on
purpose: ``x ^ (x >> n)`` then clears the sign and maps exactly two inputs to each 31-bit output, which saves the
masks.
"""

from __future__ import annotations

import torch

_MASK64 = 2**64 - 1
_GOLDEN32 = 0x9E3779B9
_MULTIPLIER = 0x7FEB352D  # of Wellons' lowbias32, found by search for low bias
_TO_UNIT = -(2.0**-31) * (1 - 2.0**-24)  # keeps the largest value, which float32 rounds up to 2**31, below 1


def request_key(seed: int, choice: int) -> tuple[int, int]:
    """Two signed 32-bit halves of a 64-bit hash of a seed (64 bits, either sign) and a choice index."""
    mixed = _splitmix64(_splitmix64(seed & _MASK64) ^ choice)
    return _signed32(mixed & 0xFFFFFFFF), _signed32(mixed >> 32)


def row_keys(request_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys of rows at positions.

    Args:
        request_keys: (rows, 2) int32, from ``request_key``.
        positions: (rows,) integers, the index of the token to be sampled in its sequence.
    Returns:
        (rows, 2) int32; the second column is odd, it multiplies.
    """
    counter = positions.to(torch.int32) * _signed32(_GOLDEN32)
    keys = _finalise(request_keys ^ counter[:, None])
    keys[:, 1] |= 1
    return keys


def token_keys(vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """(vocab_size,) int32, one well-mixed key a token id."""
    ids = torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device)
    return _finalise(ids * _signed32(_GOLDEN32))


def noise_bits(row_keys: torch.Tensor, token_keys: torch.Tensor, *, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """Uniform integers in [0, 2**31).

    Args:
        row_keys: (rows, 2) int32.
        token_keys: (columns,) or (rows, columns) int32, of any token ids in any order.
        out, scratch: (rows, columns) int32, overwritten; the result is in ``out``.
    """
    torch.bitwise_xor(token_keys, row_keys[:, :1], out=out)
    out.mul_(_MULTIPLIER)
    torch.bitwise_right_shift(out, 16, out=scratch)
    out.bitwise_xor_(scratch)
    out.mul_(row_keys[:, 1:])
    torch.bitwise_right_shift(out, 15, out=scratch)
    out.bitwise_xor_(scratch)


def unit_exponential(bits: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Unit exponentials ``E = -log(1 - u)``, finite and above zero, of uniform integers in [0, 2**31).

    Small E decide a race, and ``u = (bits + 0.5) / 2**31`` keeps its relative precision there. The operations are
    elementwise and none is fused, so that an element has the same bits wherever it stands in a batch.

    Args:
        out: float32 of the same shape, overwritten and returned.
    """
    return out.copy_(bits).add_(0.5).mul_(_TO_UNIT).log1p_().neg_()


def _splitmix64(state: int) -> int:
    """One output of SplitMix64 for a 64-bit state."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _finalise(h: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser, a permutation of the int32 values."""
    h = h ^ _shift_right_unsigned(h, 16)
    h = h * _signed32(0x85EBCA6B)
    h = h ^ _shift_right_unsigned(h, 13)
    h = h * _signed32(0xC2B2AE35)
    return h ^ _shift_right_unsigned(h, 16)


def _shift_right_unsigned(h: torch.Tensor, bits: int) -> torch.Tensor:
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def _signed32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
