from __future__ import annotations

import pytest

from benchmarks.figures import Figures, RequestTiming, markdown, ratios, summarise


def timing(sent: float, first: float, last: float, completion_tokens: int = 11) -> RequestTiming:
    return RequestTiming(sent, first, last, prompt_tokens=128, completion_tokens=completion_tokens)


def figures(contender: str, streams: int, throughput: float, *, one_by_one: bool = False) -> Figures:
    return Figures(contender, streams, 4, throughput, 0.25, 0.0125, 128.0, 100.0, one_by_one)


def test_a_request_of_one_token_has_no_time_between_tokens() -> None:
    assert timing(1.0, 1.5, 2.5).inter_token_latency == pytest.approx(0.1)
    assert timing(1.0, 1.5, 1.5, completion_tokens=1).inter_token_latency is None
    assert summarise("x", 1, [timing(1.0, 1.5, 1.5, completion_tokens=1)]).inter_token_latency_p50 is None


def test_throughput_is_over_the_whole_run_and_latencies_are_medians() -> None:
    timings = [timing(10.0, 10.2, 11.2), timing(10.0, 10.4, 12.4), timing(11.5, 13.0, 14.0, completion_tokens=21)]
    result = summarise("x", 2, timings)
    assert result.output_tokens_per_second == pytest.approx((11 + 11 + 21) / (14.0 - 10.0))
    assert result.time_to_first_token_p50 == pytest.approx(0.4)
    assert result.inter_token_latency_p50 == pytest.approx(0.1)
    assert result.mean_completion_tokens == pytest.approx(43 / 3)
    assert (result.num_requests, result.streams, result.mean_prompt_tokens) == (3, 2, 128)


def test_ratios_are_at_the_same_streams_except_for_who_works_one_by_one() -> None:
    measured = [
        *(figures("lmserve", streams, throughput) for streams, throughput in ((1, 20.0), (8, 100.0), (32, 300.0))),
        figures("generate", 1, 10.0, one_by_one=True),
        *(figures("peer", streams, throughput) for streams, throughput in ((1, 5.0), (32, 60.0))),
    ]
    assert ratios(measured, "lmserve") == {
        1: {"generate": 2.0, "peer": 4.0},
        8: {"generate": 10.0},
        32: {"generate": 30.0, "peer": 5.0},
    }


def test_the_table_says_it_all() -> None:
    measured = [
        figures("lmserve", 8, 100.0),
        figures("lmserve", 1, 20.0),
        figures("generate", 1, 10.0, one_by_one=True),
    ]
    text = markdown(measured, "lmserve", {"date": "2030-01-02", "hardware": "two cores"})
    assert text.splitlines() == [
        "- date: 2030-01-02",
        "- hardware: two cores",
        "",
        "| contender | streams | requests | output tokens/s | lmserve is | first token p50 | between tokens p50 "
        "| tokens in → out |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| lmserve | 1 | 4 | 20.0 |  | 250 ms | 12.5 ms | 128 → 100 |",
        "| generate | 1 | 4 | 10.0 | 2.0× | 250 ms | 12.5 ms | 128 → 100 |",
        "| lmserve | 8 | 4 | 100.0 |  | 250 ms | 12.5 ms | 128 → 100 |",
        "",
        "generate serves one request after the other; lmserve has 2.0× at 1, 10.0× at 8 streams.",
    ]
