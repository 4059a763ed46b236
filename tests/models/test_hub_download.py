"""The process of a download, run by its owner against a stand-in for the hub."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from lmserve.errors import (
    DownloadRefused,
    HubUnreachable,
    InvalidRequest,
    LMServeError,
    ModelNotFound,
)
from lmserve.models.downloads import Downloads, Job
from tests.hub_stand_in import HubStandIn
from tests.models.downloading import (
    HELD,
    REPO,
    download,
    large_model,
    run,
)

READ_OFFLINE = """
import json, sys
from huggingface_hub import scan_cache_dir
from transformers import AutoConfig, AutoTokenizer
config, tokenizer = AutoConfig.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=False)
print(json.dumps([config.model_type, tokens, [str(warning) for warning in scan_cache_dir().warnings]]))
"""


def test_a_whole_model_comes_and_can_be_read_offline(
    hub: HubStandIn, environ: dict[str, str], tiny_folder: Path
) -> None:
    total = hub.add_folder(REPO, tiny_folder)
    completed: list[Job] = []

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.error) == ("completed", None)
        assert job.downloaded_bytes == job.total_bytes == total == hub.bytes_served
        assert job.completed_at is not None
        assert job.started_at <= job.completed_at
        assert job.path is not None
        there = {path.name: path.read_bytes() for path in Path(job.path).iterdir()}
        assert there == {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
        assert completed == [job]

        again = await download(downloads)
        assert (again.status, again.path, again.error) == ("already_downloaded", job.path, None)
        assert again.downloaded_bytes == again.total_bytes == total == hub.bytes_served
        assert completed == [job, again]
        assert again.job_id != job.job_id

    run(test, environ, completed.append)
    read = [sys.executable, "-c", READ_OFFLINE, REPO]
    out = subprocess.run(read, env={**environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True).stdout
    model_type, tokens, warnings = json.loads(out)
    assert (model_type, warnings) == ("llama", [])
    assert len(tokens) > 5


def test_a_connection_that_breaks_is_taken_up_again(hub: HubStandIn, environ: dict[str, str]) -> None:
    total = hub.add(
        REPO, {"config.json": b"{}", "model.safetensors": large_model()["model-00002-of-00002.safetensors"]}
    )
    hub.break_after, hub.breaks = HELD, 2

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.downloaded_bytes) == ("completed", total)
        assert hub.breaks == 0
        assert hub.bytes_served < 2 * total

    run(test, environ)


@pytest.mark.slow
def test_a_connection_that_never_holds_ends_in_a_sentence(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.break_after, hub.breaks = 0, 10**6

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.path, job.refusal) == ("failed", None, None)
        assert job.error is not None
        assert f"The hub ({hub.url}) cannot be reached, or broke off" in job.error
        hub.breaks = 0
        assert (await download(downloads)).status == "completed"

    run(test, environ)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_content_never_becomes_a_model(hub: HubStandIn, environ: dict[str, str], name: str) -> None:
    total = hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.wrong.add(name)
    completed: list[Job] = []

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.path) == ("failed", None)
        assert job.error is not None
        assert f"{name} of {REPO} is not what the hub says" in job.error
        assert completed == []
        hub.wrong.clear()
        job = await download(downloads)
        assert (job.status, job.downloaded_bytes) == ("completed", total)

    run(test, environ, completed.append)


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_wrong_size_never_becomes_a_model(hub: HubStandIn, environ: dict[str, str], difference: int) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.announced["model.safetensors"] = len(b"weights") + difference

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.path) == ("failed", None)
        assert job.error is not None
        assert "size" in job.error

    run(test, environ)


def test_a_new_commit_brings_what_has_changed(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})

    async def test(downloads: Downloads) -> None:
        first = await download(downloads)
        hub.add(REPO, {"config.json": b"{ }", "model.safetensors": b"weights"})
        served = hub.bytes_served
        second = await download(downloads)
        assert (second.status, hub.bytes_served - served) == ("completed", len(b"{ }"))
        assert second.path != first.path

    run(test, environ)


def refused(hub: HubStandIn, environ: Mapping[str, str], kind: type[LMServeError], **asked: str) -> str:
    """The sentence in which a download is refused before its first byte; the job says the same."""
    said: list[str] = []

    async def test(downloads: Downloads) -> None:
        job = downloads.start(asked.pop("model", REPO), **asked)
        await downloads.wait(job.job_id)
        assert job.status == "failed"
        assert type(job.refusal) is kind
        assert str(job.refusal) == job.error
        said.append(str(job.error))

    run(test, environ)
    assert hub.bytes_served == 0
    return said[0]


def test_an_unknown_model(hub: HubStandIn, environ: dict[str, str]) -> None:
    said = refused(hub, environ, ModelNotFound)
    assert f"{REPO} is not on the hub ({hub.url})" in said
    assert "HF_TOKEN" in said


def test_an_unknown_revision(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"model.safetensors": b"weights"})
    assert refused(hub, environ, ModelNotFound, revision="v2") == f"{REPO} has no revision 'v2' on the hub."


def test_a_model_without_weights(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "onnx/model.onnx": b"weights"})
    assert "no weights that transformers reads" in refused(hub, environ, ModelNotFound)


def test_a_commit_can_be_asked_for(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"model.safetensors": b"weights"})

    async def test(downloads: Downloads) -> None:
        job = await downloads.wait(downloads.start(REPO, hub.commit(REPO)).job_id)
        assert job.status == "completed"

    run(test, environ)


def test_a_gated_model(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.gated.add(REPO)
    for more in ({}, {"HF_TOKEN": "hf_of_somebody_else"}):
        said = refused(hub, {**environ, **more}, DownloadRefused)
        assert "gated" in said
        assert "HF_TOKEN" in said
        assert "somebody_else" not in said

    async def test(downloads: Downloads) -> None:
        assert (await download(downloads)).status == "completed"

    run(test, {**environ, "HF_TOKEN": hub.token})


def test_a_hub_that_is_out_of_order(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.out_of_order = True
    assert "status 500" in refused(hub, environ, HubUnreachable)


def test_a_hub_that_cannot_be_reached(hub: HubStandIn, environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    said = refused(hub, {**environ, "HF_ENDPOINT": url}, HubUnreachable)
    assert f"({url}) cannot be reached" in said


def test_a_model_that_does_not_fit_on_the_disk(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
    hub.announced["model.safetensors"] = 10**18
    said = refused(hub, environ, DownloadRefused)
    assert "1,000,000,000,000,000,002 bytes are to come" in said
    assert "are free" in said


def test_quantizations(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.add(REPO, {"config.json": b"{}", "m-Q8_0.gguf": b"eight", "m-Q5_K_M.gguf": b"five", "a.png": b"picture"})
    for asked in ({}, {"quantization": "Q4_0"}):
        assert "m-Q5_K_M.gguf, m-Q8_0.gguf" in refused(hub, environ, InvalidRequest, **asked)

    async def test(downloads: Downloads) -> None:
        job = await download(downloads, quantization="q8_0")
        assert job.status == "completed"
        assert job.path is not None
        assert sorted(path.name for path in Path(job.path).iterdir()) == ["config.json", "m-Q8_0.gguf"]

    run(test, environ)
