"""A server of a user's that downloads: what else it does meanwhile, and how it ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.api.running_server import wait_until
from tests.e2e.serving import Server, start
from tests.hub_stand_in import HubStandIn, hub_stand_in
from tests.models.downloading import processes_of_downloads
from tests.processes import still_running

REPO = "someone/tiny"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights" * 1000})
        hub.hold_after = 100
        yield hub


@pytest.fixture
def server(tmp_path: Path, tiny_folder: Path, hub: HubStandIn) -> Iterator[Server]:
    cache = str(tmp_path / "hub")
    with start(tmp_path, str(tiny_folder), HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="0") as running:
        yield running


def begin_download(server: Server) -> psutil.Process:
    """Its process, which the hub holds."""
    response = httpx.post(f"{server.url}/api/v1/models/download", json={"model": REPO}, timeout=60)
    assert response.json()["status"] == "downloading", response.text
    (process,) = processes_of_downloads(psutil.Process(server.process.pid))
    return process


def test_requests_are_answered_while_a_download_runs(server: Server) -> None:
    process = begin_download(server)
    stream = server.client().completions.create(
        model="tiny", prompt="a", max_tokens=20, stream=True, extra_body={"ignore_eos": True}
    )
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert process.is_running()


def test_a_signal_ends_a_download_with_the_server(server: Server, tmp_path: Path) -> None:
    """Tidily: a killed one would leave half a file."""
    process = begin_download(server)
    wait_until(lambda: list((tmp_path / "hub").rglob("*.incomplete")))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not process.is_running()
    assert not list((tmp_path / "hub").rglob("*.incomplete"))


def test_no_download_survives_a_killed_server(server: Server) -> None:
    process = begin_download(server)
    server.process.kill()
    assert not still_running([process])
