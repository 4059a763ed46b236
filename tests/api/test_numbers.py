from __future__ import annotations

import math

import pytest

from lmserve.api.schema.numbers import keep_alive_seconds
from lmserve.errors import InvalidRequest


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        ("0", 0),
        (30, 30),
        (2.5, 2.5),
        ("3600", 3600),
        ("5m", 300),
        ("1h30m", 5400),
        ("300ms", 0.3),
        ("1.5s", 1.5),
        (-1, math.inf),
        ("-1", math.inf),
        ("-5m", math.inf),
    ],
)
def test_durations_as_ollama_writes_them(value: str | float, seconds: float) -> None:
    assert keep_alive_seconds(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "soon", "5 m", "1e3", "m", "--1", "5d", "1h-3m", "9" * 5000 + "x"])
def test_what_is_none(value: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        keep_alive_seconds(value)
    assert refused.value.param == "keep_alive"
