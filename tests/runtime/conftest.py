from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.threads import threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
