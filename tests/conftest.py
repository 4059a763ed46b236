from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from lmserve.models.starter import ensure_starter
from tests.processes import still_running
from tests.tiny_folder import write_tiny_folder

SESSION = "TEST_SESSION"

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
"""The same examples in each run, that a failure belongs to the change before it; ``explore`` looks for new ones."""


@pytest.fixture(scope="session", autouse=True)
def _no_process_outlives_the_tests() -> Iterator[None]:
    """Every process that a test starts, and theirs, carry this session's mark: none may be left."""
    mark = os.environ[SESSION] = uuid.uuid4().hex
    yield
    left = [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process, mark)]
    alive = still_running(left, 15.0)
    assert not alive, [process.cmdline() for process in alive]


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        if process.ppid() == os.getpid() and any("resource_tracker" in part for part in process.cmdline()):
            return False  # Python's own, which ends with this process
        return process.environ().get(SESSION) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:  # ended, or another user's
        return False


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, called ``tiny``."""
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def starter_folder() -> Path:
    """The starter chat model, in the cache folder that the user's own starts share."""
    return ensure_starter("smollm2-135m-instruct")
