from __future__ import annotations

import pytest
import torch

from lmserve.runtime import logprobs
from lmserve.runtime.logprobs import RankedLogprobs, rank_logprobs
from lmserve.sampling_params import MAX_LOGPROBS
from tests.runtime.sampler_rows import VOCAB, make_logits


def rank(rows: list[int], token_ids: list[int], logits: torch.Tensor) -> RankedLogprobs:
    return rank_logprobs(logits, torch.tensor(rows), torch.tensor(token_ids))


def test_the_rows_that_are_named_in_their_order() -> None:
    logits = make_logits(6)
    expected = logits.double().log_softmax(-1)
    ranked = rank([4, 1, 4], [7, 8, 996], logits)
    for i, (row, token_id) in enumerate(((4, 7), (1, 8), (4, 996))):
        assert ranked.chosen[i].item() == pytest.approx(expected[row, token_id].item(), rel=1e-5)
        best = expected[row].topk(MAX_LOGPROBS)
        assert torch.equal(ranked.top_ids[i], best.indices)
        assert torch.allclose(ranked.top[i].double(), best.values, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_whatever_the_models_dtype(dtype: torch.dtype) -> None:
    logits = make_logits(2).to(dtype)
    ranked = rank([0, 1], [3, 3], logits)
    expected = logits.double().log_softmax(-1)[:, 3]
    assert torch.allclose(ranked.chosen.double(), expected, atol=1e-5)


def test_slices_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(7)
    whole = rank(list(range(7)), list(range(7)), logits)
    for elements in (1, 3 * VOCAB):
        monkeypatch.setattr(logprobs, "_SLICE_ELEMENTS", elements)
        sliced = rank(list(range(7)), list(range(7)), logits)
        assert torch.equal(sliced.chosen, whole.chosen)
        assert torch.equal(sliced.top_ids, whole.top_ids)
        assert torch.equal(sliced.top, whole.top)


def test_equal_ones_are_listed_by_token_id() -> None:
    logits = torch.zeros(1, 10)
    logits[0, [2, 6, 4]] = 1.0
    assert rank([0], [0], logits).top_ids.tolist() == [[2, 4, 6, 0, 1, 3, 5, 7, 8, 9]]


def test_on_the_host_each_row_has_as_many_as_it_asked_for() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    first, second = rank([0, 1], [2, 0], logits).to_host([2, 0])
    assert [token_id for token_id, _ in first.top] == [0, 1]
    assert [first.logprob, *(value for _, value in first.top)] == pytest.approx(
        torch.log(torch.tensor([0.25, 0.5, 0.25])).tolist()
    )
    assert second.logprob == pytest.approx(-2.0794415)
    assert second.top == ()
