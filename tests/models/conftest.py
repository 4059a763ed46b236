from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_stand_in import HubStandIn, environment, hub_stand_in
from tests.models.managing import Recorder


@pytest.fixture(autouse=True)
def _no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        yield hub


@pytest.fixture
def environ(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    """That of a server whose cache is empty."""
    return environment(hub, tmp_path)
