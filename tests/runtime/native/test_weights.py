"""Products of packed weights: right, and for a row the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmserve.runtime.native.linear import NativeLinear
from lmserve.runtime.native.weights import KINDS, PackedWeight, WeightKind, has_tiles, linear
from tests.runtime.native.availability import REASON, needs_native

pytestmark = needs_native
TILES = (False, True) if not REASON and has_tiles() else (False,)
FORMAT = {"float32": torch.float32}
SIZES = ((576, 576), (100, 70), (33, 100), (96, 1536), (1, 1), (32, 64))
BIG = 5000
"""Rows: more than any step has."""


def packed(
    kind: WeightKind, n: int, k: int, *, tiles: bool = True, bias: bool = True
) -> tuple[PackedWeight, Tensor, Tensor]:
    """A weight, what it counts as, and its bias."""
    torch.manual_seed(n * k)
    dtype = FORMAT.get(kind, torch.bfloat16)
    plain, added = torch.randn(n, k).mul_(0.05).to(dtype), torch.randn(n) if bias else torch.zeros(n)
    weight = PackedWeight(kind, [n], k, use_tiles=tiles)
    weight.pack(0, plain, added if bias else None)
    return weight, weight.unpack(0), added


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right(kind: WeightKind, n: int, k: int, tiles: bool, dtype: torch.dtype) -> None:
    if kind in ("float32", "bfloat16") and dtype != FORMAT.get(kind, torch.bfloat16):
        pytest.skip("plain weights meet activations of their own format")
    weight, plain, bias = packed(kind, n, k, tiles=tiles)
    x = torch.randn(67, k).to(dtype)
    expected = x.double() @ plain.double().t() + bias.double()
    got = linear(weight.parts[0], x, 2)
    assert (got.dtype, got.shape) == (dtype, (67, n))
    error = ((got.double() - expected).norm() / expected.norm()).item()
    # Rounding to bfloat16 is 2^-9 at most, a third of that on average; activations in 8 bits lose more.
    assert error < (
        2e-6 if kind == "float32" else 2.5e-3 if kind == "bfloat16" or (kind, tiles) == ("int8", True) else 1e-2
    )


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company(kind: WeightKind, tiles: bool, data: st.DataObject) -> None:
    weight, _, _ = packed(kind, 96, 160, tiles=tiles)
    torch.manual_seed(0)
    x = torch.randn(300, 160).to(FORMAT.get(kind, torch.bfloat16))
    whole = linear(weight.parts[0], x, 2)
    first = data.draw(st.integers(0, 299))
    count = data.draw(st.integers(1, 300 - first))
    threads = data.draw(st.integers(1, 2))
    assert torch.equal(linear(weight.parts[0], x[first : first + count], threads), whole[first : first + count])


@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_are_each_a_weight_of_their_own(kind: WeightKind) -> None:
    sizes, dtype = (70, 32, 5), FORMAT.get(kind, torch.bfloat16)
    joined = PackedWeight(kind, sizes, 64)
    weights = [torch.randn(size, 64).to(dtype) for size in sizes]
    biases = [torch.randn(70), None, torch.randn(5)]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        joined.pack(index, weight, bias)
    assert joined.offsets == [0, 96, 128, 160], "each begins with a panel"
    x = torch.randn(9, 64).to(dtype)
    whole = linear(joined.struct, x, 2)
    for index, size in enumerate(sizes):
        first = joined.offsets[index]
        assert torch.equal(whole[:, first : first + size], linear(joined.parts[index], x, 1))


def test_weights_in_fewer_bits_are_near_the_plain_ones() -> None:
    torch.manual_seed(0)
    plain = torch.randn(64, 256)
    for kind, worst in (("float32", 0.0), ("bfloat16", 2**-8), ("int8", 0.012), ("int4", 0.12)):
        weight = PackedWeight(kind, [64], 256)  # type: ignore[arg-type]  # one of KINDS
        weight.pack(0, plain)
        assert ((weight.unpack(0) - plain).norm() / plain.norm()).item() <= worst
    assert PackedWeight("int8", [64], 256).num_bytes < PackedWeight("bfloat16", [64], 256).num_bytes * 0.6
    assert PackedWeight("int4", [64], 256).num_bytes < PackedWeight("bfloat16", [64], 256).num_bytes * 0.35


def test_not_a_number_stays_none_and_zeros_are_no_division_by_zero() -> None:
    for kind in KINDS:
        weight, _, bias = packed(kind, 40, 64)
        dtype = FORMAT.get(kind, torch.bfloat16)
        assert torch.equal(linear(weight.parts[0], torch.zeros(2, 64, dtype=dtype), 1)[0], bias.to(dtype))
        if kind in ("float32", "bfloat16"):
            broken = torch.zeros(2, 64, dtype=dtype)
            broken[1, 5] = float("nan")
            result = linear(weight.parts[0], broken, 1)
            assert result[1].isnan().all()
            assert not result[0].isnan().any()


def test_a_layer_takes_any_leading_dimensions() -> None:
    weight, plain, bias = packed("bfloat16", 48, 64)
    layer = NativeLinear(weight, 0, torch.bfloat16)
    x = torch.randn(2, 3, 64).to(torch.bfloat16)
    assert layer(x).shape == (2, 3, 48)
    assert torch.equal(layer(x)[1, 2], layer(x[1, 2][None])[0])
    assert torch.equal(layer.weight.float(), plain)
    assert layer(x[:0]).shape == (0, 3, 48)
    assert bias.shape == (48,)


def test_more_rows_than_any_step_has() -> None:
    weight, plain, _ = packed("bfloat16", 64, 64, bias=False)
    x = torch.randn(BIG, 64).to(torch.bfloat16)
    expected = x.float() @ plain.t()
    assert (linear(weight.parts[0], x, 2).float() - expected).abs().max() < 0.05
