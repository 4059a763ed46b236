from __future__ import annotations

from lmserve.engine.request import Request
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import make_request


def test_token_ids_run_over_prompt_and_output() -> None:
    request = make_request(4)
    request.output_token_ids += [40, 41, 42]
    everything = [0, 1, 2, 3, 40, 41, 42]
    for start in range(8):
        for end in range(start, 8):
            assert request.token_ids(start, end) == everything[start:end]
    assert (request.num_prompt_tokens, request.num_tokens) == (4, 7)


def test_eos_ends_unless_it_is_ignored() -> None:
    def ends(sampling: SamplingParams) -> frozenset[int]:
        return Request(
            request_id="r", choice=0, prompt_token_ids=[1], sampling=sampling, eos_token_ids=(7, 8), arrival=0
        ).end_token_ids

    assert ends(SamplingParams(max_tokens=1, stop_token_ids=(3,))) == {3, 7, 8}
    assert ends(SamplingParams(max_tokens=1, stop_token_ids=(3,), ignore_eos=True)) == {3}


def test_rank_is_priority_then_arrival() -> None:
    requests = [make_request(priority=p, arrival=a) for p, a in ((1, 0), (0, 2), (0, 1), (-1, 3))]
    assert [r.arrival for r in sorted(requests, key=lambda r: r.rank)] == [3, 1, 2, 0]


def test_what_is_to_be_reported_has_to_be_computed() -> None:
    request = make_request(6, sampling=SamplingParams(max_tokens=9, prompt_logprobs=0))
    request.output_token_ids += [40, 41]
    assert request.num_skippable_tokens == 0
    assert list(request.unreported(0, 8)) == [0, 1, 2, 3, 4], "the prompt's last token predicts one of the output"
    request.num_prompt_logprobs = 3
    assert request.num_skippable_tokens == 3
    assert list(request.unreported(2, 5)) == [3, 4]
    request.num_prompt_logprobs = 5
    assert request.num_skippable_tokens == 7
    assert list(request.unreported(0, 8)) == []


def test_only_the_first_choice_reports() -> None:
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, n=2)
    wanted = [
        Request(request_id="r", choice=i, prompt_token_ids=[1, 2, 3], sampling=sampling, arrival=i) for i in range(2)
    ]
    assert [request.num_prompt_logprobs_wanted for request in wanted] == [2, 0]
