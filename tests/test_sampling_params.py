from __future__ import annotations

import pytest

from lmserve.errors import InvalidRequest
from lmserve.sampling_params import MAX_LOGPROBS, SamplingParams


@pytest.mark.parametrize("count", [None, 0, MAX_LOGPROBS])
def test_prompt_logprobs_in_range(count: int | None) -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=count).prompt_logprobs == count


@pytest.mark.parametrize("count", [-1, MAX_LOGPROBS + 1])
def test_prompt_logprobs_out_of_range(count: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"logprobs must be in \[0, {MAX_LOGPROBS}\], got {count}") as caught:
        SamplingParams(max_tokens=0, prompt_logprobs=count)
    assert caught.value.param == "logprobs"
