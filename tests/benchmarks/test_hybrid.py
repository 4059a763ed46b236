from __future__ import annotations

import pytest

from benchmarks.hybrid import main, parse_arguments, report


def test_it_runs_in_the_state_lane(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--streams", "3", "--prompt", "9", "--tokens", "4", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("state lane")
    assert lines[1] == "- 3 streams, 9 tokens in, 4 out"
    assert len(lines) == 7


def test_the_ratios_are_of_the_same_round() -> None:
    rounds = [
        {"generate": 10.0, "alone": 20.0, "together": 40.0},
        {"generate": 5.0, "alone": 10.0, "together": 30.0},
        {"generate": 1.0, "alone": 2.0, "together": 5.0},
    ]
    *_, alone, generate = report(parse_arguments([]), "state", rounds)
    assert alone.endswith("one by one, median: 2.50")
    assert generate.endswith("one by one, median: 5.00")
