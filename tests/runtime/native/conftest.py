from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.threads import threads


@pytest.fixture(scope="package", autouse=True)
def _two_threads() -> Iterator[None]:
    """Native programs share their work out."""
    with threads(2):
        yield
