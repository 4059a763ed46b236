from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Server, start

STARTER = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def starter_server(tmp_path_factory: pytest.TempPathFactory, starter_folder: Path) -> Iterator[Server]:
    """SmolLM2 in float32: the number format in which greedy output has to equal ``generate``."""
    folder = tmp_path_factory.mktemp("starter-server")
    with start(folder, f"{STARTER}={starter_folder}", "--dtype", "float32", "--max-model-len", "2048") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Server]:
    """For tests that only ask."""
    with start(tmp_path_factory.mktemp("tiny-server"), str(tiny_folder), "--max-model-len", "2000") as server:
        yield server
