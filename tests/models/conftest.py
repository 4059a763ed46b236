from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.managing import Recorder


@pytest.fixture(autouse=True)
def _no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
