from __future__ import annotations

import pytest
import torch

from lmserve.runtime.native.sampling import first_largest
from tests.runtime.native.availability import needs_native

pytestmark = needs_native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 1023, 1024, 1025, 49152])
def test_it_is_the_lowest_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(17, vocab).to(dtype)  # in bfloat16 there are many equal ones
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert first_largest(logits).tolist() == expected
    wide = torch.zeros(17, vocab + 9, dtype=dtype)
    wide[:, :vocab] = logits
    assert first_largest(wide[:, :vocab]).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_none_where_nothing_can_be_chosen(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 2000, dtype=dtype)
    logits[0, 1999] = float("nan")
    logits[1] = float("-inf")
    logits[2, :1500] = float("-inf")
    logits[3, 77] = float("inf")
    assert first_largest(logits).tolist() == [-1, -1, 1500, 77]
    assert first_largest(logits[:0]).tolist() == []
