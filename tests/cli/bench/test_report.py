from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lmserve.cli.bench.plot import NoPlot, plot
from lmserve.cli.bench.report import compare, markdown, overview, table
from lmserve.cli.bench.results import Figures, Results, ScenarioResult


def results(name: str, **rates: tuple[float, ...]) -> Results:
    """Scenarios with so many tokens/s a round; a first token takes 10 / rate seconds."""
    scenarios = [
        ScenarioResult(
            scenario, f"of {scenario}", [Figures(rate, 2 * rate, time_to_first_token_p50=10 / rate) for rate in rounds]
        )
        for scenario, rounds in rates.items()
    ]
    return Results(name, {"date": "2030-01-02"}, scenarios)


def test_rows_stand_by_scenario() -> None:
    rows = table([results("ours", s1=(20.0, 22.0, 21.0), s8=(100.0,)), results("theirs", s1=(10.0,))])
    assert [row[:3] for row in rows] == [("s1", "ours", "21.0"), ("s1", "theirs", "10.0"), ("s8", "ours", "100.0")]
    assert (rows[0][-1], rows[1][-1]) == ("20.0 to 22.0", "")


def test_markdown_compares_the_first_with_the_others() -> None:
    text = markdown([results("ours", s1=(20.0,)), results("theirs", s1=(8.0,), s8=(5.0,))])
    assert "- ours: date: 2030-01-02" in text
    lines = [line for line in text.splitlines() if line.startswith("| s")]
    assert lines[0].startswith("| scenario |")
    assert lines[1].startswith("| s1 | ours | 20.0 | 40.0 | 500.0 ms |")
    assert lines[1].endswith("|  |")
    assert lines[2].endswith("| 2.50 × |")
    assert lines[3].startswith("| s8 | theirs")
    assert lines[3].endswith("|  |"), "ours has none"


def test_an_overview_has_a_row_for_each_contender() -> None:
    mixed = Figures(9.0, 18.0, between_pieces_p50=0.02, between_pieces_p95=0.03, long_prompt_seconds=7.0)
    prefill = Figures(10.0, 2000.0)
    scenarios = [ScenarioResult("prefill", "", [prefill]), ScenarioResult("mixed", "", [mixed])]
    theirs = Results("theirs", {}, scenarios, ready_seconds=3.0)
    head, _, *rows = overview([results("ours", s1=(20.0, 30.0)), theirs])
    assert head == "| contender | s1, output tokens/s | prefill, total tokens/s | mixed, gaps p50 / p95 | ready |"
    assert rows == ["| ours | 25 |  |  |  |", "| theirs |  | 2,000 | 20.0 ms / 30.0 ms | 3.0 s |"]
    assert set(overview([theirs])) < set(markdown([theirs]).splitlines())


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((10.0, 11.0), (12.0, 13.0), "better"),
        ((12.0, 13.0), (10.0, 11.0), "worse"),
        ((10.0, 12.0), (11.0, 13.0), "within spread"),
        ((10.0,), (10.0,), "within spread"),
    ],
)
def test_a_verdict_needs_ranges_that_do_not_overlap(
    before: tuple[float, ...], after: tuple[float, ...], verdict: str
) -> None:
    found = compare(results("a", s1=before, s8=(1.0,)), results("b", s1=after))
    assert {each.verdict for each in found} == {verdict}, "of throughput and of times alike"
    assert {each.scenario for each in found} == {"s1"}
    better = sum(after) / len(after) >= sum(before) / len(before)
    assert all((each.ratio >= 1) == better for each in found)


def test_a_plot_needs_its_library(tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    runs = [results("ours", s1=(20.0, 30.0), s8=(100.0,)), results("theirs", s1=(10.0,))]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(NoPlot, match="needs matplotlib"):
            plot(runs, picture)
    else:
        plot(runs, picture)
        assert "<svg" in picture.read_text()
