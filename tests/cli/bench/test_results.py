from __future__ import annotations

from pathlib import Path

import pytest

from lmserve.cli.bench.results import (
    BadResults,
    Figures,
    Results,
    ScenarioResult,
    Timing,
    machine_facts,
    merge,
    percentile,
    read_results,
    summarise,
    write_results,
)


def timing(sent: float, first: float, last: float, completion_tokens: int = 11, gaps: tuple[float, ...] = ()) -> Timing:
    return Timing(sent, first, last, 128, completion_tokens, gaps)


def test_a_request_of_one_token_has_no_time_between_tokens() -> None:
    assert timing(1.0, 1.5, 2.5).per_output_token == pytest.approx(0.1)
    one = summarise([timing(1.0, 1.5, 1.5, completion_tokens=1)])
    assert (one.per_output_token_p50, one.between_pieces_p95) == (None, None)


def test_throughput_is_over_the_whole_run_and_latencies_are_medians() -> None:
    timings = [
        timing(10.0, 10.2, 11.2, gaps=(0.1,) * 19),
        timing(10.0, 10.4, 12.4),
        timing(11.5, 13.0, 14.0, completion_tokens=21, gaps=(0.9,)),
    ]
    figures = summarise(timings)
    assert figures.output_tokens_per_second == pytest.approx((11 + 11 + 21) / (14.0 - 10.0))
    assert figures.total_tokens_per_second == pytest.approx((11 + 11 + 21 + 3 * 128) / (14.0 - 10.0))
    assert figures.time_to_first_token_p50 == pytest.approx(0.4)
    assert figures.time_to_first_token_p95 == pytest.approx(1.5)
    assert figures.per_output_token_p50 == pytest.approx(0.1)
    assert (figures.between_pieces_p50, figures.between_pieces_p95) == (0.1, 0.1)
    assert (figures.num_requests, figures.mean_prompt_tokens) == (3, 128.0)


@pytest.mark.parametrize(("share", "expected"), [(0.05, 1), (0.5, 10), (0.95, 19), (0.951, 20), (1.0, 20)])
def test_percentiles_are_values_that_were_there(share: float, expected: int) -> None:
    assert percentile(list(range(20, 0, -1)), share) == expected


def test_medians_are_over_rounds() -> None:
    rounds = [summarise([timing(0.0, 0.5, last)]) for last in (1.0, 4.0, 2.0)]
    assert ScenarioResult("s", "", rounds).median("output_tokens_per_second") == pytest.approx(11 / 2.0)
    assert ScenarioResult("s", "", rounds).median("long_prompt_seconds") is None


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rounds = [summarise([timing(0.0, 0.5, 1.0)])]
    results = Results("ours", machine_facts("lmserve bench"), [ScenarioResult("s1", "one", rounds)], ready_seconds=1.5)
    write_results(results, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results
    assert {"command", "hardware", "lmserve", "date"} <= set(results.facts)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"contender": "a", "facts": {}, "scenarios": [], "format": 9}']
)
def test_what_is_no_result_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(BadResults, match=r"r\.json: "):
        read_results(tmp_path / "r.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadResults, match="nowhere"):
        read_results(tmp_path / "nowhere.json")


def test_runs_of_one_contender_are_one() -> None:
    def run(name: str, scenario: str, rate: float, ready: float) -> Results:
        figures = [Figures(rate, 2 * rate)]
        return Results(
            name, {"date": "2030-01-02"}, [ScenarioResult(scenario, "", figures)], ready, memory_bytes=int(rate)
        )

    ours, theirs = merge([run("a", "s1", 1.0, 3.0), run("b", "s1", 9.0, 1.0), run("a", "s1", 2.0, 5.0)])
    assert (ours.contender, theirs.contender) == ("a", "b")
    assert ours.scenarios[0].values("output_tokens_per_second") == [1.0, 2.0]
    assert (ours.ready_seconds, ours.memory_bytes) == (4.0, 2)
    assert [s.name for s in merge([run("a", "s1", 1.0, 1.0), run("a", "s8", 1.0, 1.0)])[0].scenarios] == ["s1", "s8"]
