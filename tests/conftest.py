from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_folder import write_tiny_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, called ``tiny``."""
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
