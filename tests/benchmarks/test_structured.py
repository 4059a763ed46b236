from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from benchmarks.structured import ANIMAL, SCHEMA, bodies, parse_arguments, report
from lmserve.grammar.schema import enforceable


def test_both_kinds_ask_for_the_same_but_for_the_form() -> None:
    free, constrained = (bodies(3, 10, 0.5, constrained=kind) for kind in (False, True))
    for one, other in zip(free, constrained, strict=True):
        assert one["messages"] == other["messages"]
        assert one["max_tokens"] == other["max_tokens"] == one["min_tokens"] == 10
        assert "min_tokens" not in other
    assert len({body["messages"][0]["content"] for body in free}) == 3


def test_the_list_has_no_end_that_could_be_reached() -> None:
    assert enforceable(SCHEMA, "schema")
    animal = {"name": "cat", "legs": 4, "lives_in": "land", "tame": True, "names": ["Tom"]}
    jsonschema.validate(animal, ANIMAL)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([animal] * 100, SCHEMA)


def test_the_report_has_the_median_ratio(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = parse_arguments([str(tmp_path), "--streams", "4"])
    lines = list(report(options, [(100.0, 90.0), (100.0, 96.0), (200.0, 250.0)]))
    assert lines[-1] == "ratio, median: 0.960"
    assert lines[2] == "free 100 tokens/s, constrained 90: 0.900"
    assert "4 streams" in lines[1]
