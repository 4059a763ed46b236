"""Downloads over HTTP, as a client of LM Studio's REST API asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from lmserve.api.schema.manage import DownloadJob
from lmserve.models.downloads import MAX_RUNNING, MAX_WAITING
from tests.api.running_server import RunningServer, running_server, wait_until
from tests.hub_stand_in import HubStandIn, environment, hub_stand_in

BASE = "/api/v1/models/download"
REPO = "someone/tiny"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 10}
TOTAL = 72


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        yield hub


@pytest.fixture
def downloading(hub: HubStandIn, tmp_path: Path) -> Iterator[RunningServer]:
    """A server whose hub is the stand-in, and whose cache is empty."""
    with running_server(environ=environment(hub, tmp_path)) as server:
        yield server


def job_of(response: httpx.Response) -> DownloadJob:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return msgspec.json.decode(response.content, type=DownloadJob)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def status_of(server: RunningServer, job_id: str) -> DownloadJob:
    return job_of(server.get(f"{BASE}/status/{job_id}"))


def moment(text: str | None) -> datetime:
    assert text is not None
    assert text.endswith("Z")
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def test_a_download_from_start_to_end(downloading: RunningServer, hub: HubStandIn) -> None:
    hub.add(REPO, FILES)
    hub.hold_after = 10
    job = job_of(downloading.post(BASE, {"model": REPO}))
    assert (job.model, job.status, job.total_size_bytes) == (REPO, "downloading", TOTAL)
    assert (job.completed_at, job.path, job.error) == (None, None, None)
    assert job_of(downloading.post(BASE, {"model": REPO, "revision": "main"})).job_id == job.job_id
    assert status_of(downloading, job.job_id).status == "downloading"
    assert downloading.chat().status_code == 200

    hub.released.set()
    wait_until(lambda: status_of(downloading, job.job_id).status != "downloading")
    done = status_of(downloading, job.job_id)
    assert (done.status, done.downloaded_bytes, done.total_size_bytes) == ("completed", TOTAL, TOTAL)
    assert moment(job.started_at) == moment(done.started_at) <= moment(done.completed_at) <= datetime.now(timezone.utc)
    assert done.path is not None
    assert (Path(done.path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    wait_until(lambda: [completed.job_id for completed in downloading.completed] == [job.job_id])

    again = job_of(downloading.post(BASE, {"model": REPO}))
    assert (again.status, again.path, again.downloaded_bytes) == ("already_downloaded", done.path, TOTAL)
    assert hub.bytes_served == TOTAL


def test_cancel(downloading: RunningServer, hub: HubStandIn) -> None:
    hub.add(REPO, FILES)
    hub.hold_after = 10
    job = job_of(downloading.post(BASE, {"model": REPO}))
    cancelled = job_of(downloading.post(f"{BASE}/cancel/{job.job_id}", {}))
    assert (cancelled.job_id, cancelled.status) == (job.job_id, "cancelled")
    assert (
        cancelled == status_of(downloading, job.job_id) == job_of(downloading.post(f"{BASE}/cancel/{job.job_id}", {}))
    )
    assert downloading.completed == []


@pytest.mark.parametrize(("method", "action"), [("GET", "status"), ("POST", "cancel")])
def test_an_unknown_job(server: RunningServer, method: str, action: str) -> None:
    with server.http as http:
        error = error_of(http.request(method, f"{BASE}/{action}/job_of_nobody"), 404)
    assert (error["code"], error["param"]) == ("job_not_found", "job_id")
    assert "job_of_nobody" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"),
        ({"model": 3}, "model"),
        ({"model": "https://hub/a/b"}, "model"),
        ({"model": "a/../b"}, "model"),
        ({"model": REPO, "revision": "../main"}, "revision"),
        ({"model": REPO, "quantization": "Q4 K"}, "quantization"),
    ],
)
def test_malformed(downloading: RunningServer, hub: HubStandIn, body: dict[str, object], param: str) -> None:
    assert error_of(downloading.post(BASE, body), 400)["param"] == param
    assert hub.requests == []


def test_what_is_refused_before_the_first_byte_is_an_error(downloading: RunningServer, hub: HubStandIn) -> None:
    hub.add("someone/ggufs", {"m-Q8_0.gguf": b"eight", "m-Q5_K_M.gguf": b"five"})
    hub.add("someone/gated", FILES)
    hub.gated.add("someone/gated")
    hub.add("someone/huge", {"pytorch_model.bin": b"weights"})
    hub.announced["pytorch_model.bin"] = 10**18
    hub.add(REPO, FILES)
    for body, status, code, param, words in (
        ({"model": "someone/nothing"}, 404, "model_not_found", "model", "is not on the hub"),
        ({"model": REPO, "revision": "v2"}, 404, "model_not_found", "revision", "no revision 'v2'"),
        ({"model": "someone/ggufs"}, 400, None, "quantization", "m-Q5_K_M.gguf, m-Q8_0.gguf"),
        ({"model": "someone/gated"}, 400, "download_refused", "model", "HF_TOKEN"),
        ({"model": "someone/huge"}, 400, "download_refused", "model", "1,000,000,000,000,000,000 bytes"),
    ):
        error = error_of(downloading.post(BASE, body), status)
        assert (error["code"], error["param"]) == (code, param)
        assert words in error["message"]
    hub.out_of_order = True
    response = downloading.post(BASE, {"model": REPO})
    assert error_of(response, 503)["code"] == "hub_unreachable"
    assert int(response.headers["retry-after"]) > 0


def test_an_offline_server(server: RunningServer) -> None:
    error = error_of(server.post(BASE, {"model": REPO}), 400)
    assert error["code"] == "download_refused"
    assert "HF_HUB_OFFLINE" in error["message"]


def test_too_many(downloading: RunningServer, hub: HubStandIn) -> None:
    hub.hold_after = 1
    for number in range(MAX_RUNNING + MAX_WAITING):
        hub.add(f"someone/model-{number}", FILES)
        job = job_of(downloading.post(BASE, {"model": f"someone/model-{number}"}))
        assert (job.status, job.total_size_bytes) == ("downloading", TOTAL if number < MAX_RUNNING else 0)
    response = downloading.post(BASE, {"model": "someone/more"})
    error = error_of(response, 429)
    assert error["code"] == "queue_full"
    assert int(response.headers["retry-after"]) > 0


def test_fields_without_effect_are_reported(downloading: RunningServer, hub: HubStandIn) -> None:
    hub.add(REPO, FILES)
    response = downloading.post(BASE, {"model": REPO, "threads": 4})
    assert response.headers["x-lmserve-ignored"] == "threads"
