from __future__ import annotations

import pytest

from lmserve.cli.tables import format_seconds, format_size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (91.6 * 2**20, "91.6 MiB"),
        (4.58 * 2**30, "4.58 GiB"),
        (640 * 2**30, "640.0 GiB"),
        (3000 * 2**40, "3000.0 TiB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m"), (90, "1m 30s"), (3599.7, "1h"), (7500, "2h 5m"), (90000, "25h")],
)
def test_spans(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
