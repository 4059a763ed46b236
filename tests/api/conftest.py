from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.running_server import RunningServer, running_server


@pytest.fixture(scope="session")
def one_server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(one_server: RunningServer) -> RunningServer:
    """One server for all tests, with a fresh engine for each."""
    one_server.reset()
    return one_server
