from __future__ import annotations

from pathlib import Path

import pytest

from lmserve.models.starter import ensure_starter
from tests.tiny_folder import write_tiny_folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, called ``tiny``."""
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def starter_folder() -> Path:
    """The starter chat model, in the cache folder that the user's own starts share."""
    return ensure_starter("smollm2-135m-instruct")
