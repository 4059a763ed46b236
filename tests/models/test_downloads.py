"""Real processes, the real huggingface_hub, and a stand-in for the hub."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import uvloop

from lmserve.errors import (
    DownloadRefused,
    HubUnreachable,
    InvalidRequest,
    JobNotFound,
    LMServeError,
    ModelNotFound,
    QueueFull,
)
from lmserve.models.downloads import MAX_REMEMBERED, MAX_RUNNING, MAX_WAITING, Downloads, Job
from tests.hub_stand_in import HubStandIn, environment, hub_stand_in

PATIENCE = 60.0
"""Seconds that anything may take before a test is wrong."""
REPO = "someone/tiny"
MIB = 1 << 20
HELD = 13 * MIB
"""huggingface_hub writes pieces of 10 MiB: of a file that is held here, one is on the disk."""

Test = Callable[[Downloads], Awaitable[None]]


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as hub:
        yield hub


@pytest.fixture
def environ(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    """That of a server whose cache is empty."""
    return environment(hub, tmp_path)


def run(test: Test, environ: Mapping[str, str], on_completed: Callable[[Job], None] | None = None) -> None:
    """On the loop that the server has. No process is left behind."""

    async def go() -> None:
        downloads = Downloads(on_completed, environ)
        try:
            await asyncio.wait_for(test(downloads), PATIENCE)
        finally:
            await downloads.close()
            assert not processes_of_downloads()

    uvloop.run(go())


def processes_of_downloads(of: psutil.Process | None = None) -> list[psutil.Process]:
    children = (of or psutil.Process()).children(recursive=True)
    return [child for child in children if "lmserve.models.hub_download" in " ".join(child.cmdline())]


def large_model() -> dict[str, bytes]:
    """Two shards, of which one is small enough to come whole while the other is held."""
    noise = random.Random(0).randbytes
    return {
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": noise(2 * MIB),
        "model-00002-of-00002.safetensors": noise(24 * MIB),
    }


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def download(downloads: Downloads, model: str = REPO, quantization: str | None = None) -> Job:
    return await downloads.wait(downloads.start(model, quantization=quantization).job_id)


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


def test_how_far_it_is(hub: HubStandIn, environ: dict[str, str]) -> None:
    """Figures that rise, stand still while nothing comes, and end at the whole."""
    total = hub.add(REPO, large_model())
    hub.hold_after = HELD
    seen: list[int] = []

    async def test(downloads: Downloads) -> None:
        job = downloads.start(REPO)
        assert (job.total_bytes, job.estimated_completion) == (0, None)
        await asyncio.wait_for(job.decided.wait(), PATIENCE)
        assert job.total_bytes == total

        def look() -> bool:
            seen.append(job.downloaded_bytes)
            return job.downloaded_bytes >= 12 * MIB + len(b"{}")

        await until(look)
        assert job.downloaded_bytes == 12 * MIB + len(b"{}")
        assert job.bytes_per_second > 0
        assert [job.estimated_completion] != [None]
        hub.released.set()
        await until(lambda: look() and job.has_ended)
        assert (job.status, job.downloaded_bytes) == ("completed", total)
        assert job.estimated_completion is None
        assert seen == sorted(seen)

    run(test, environ)


def test_a_cancelled_download_goes_on_where_it_was(hub: HubStandIn, environ: dict[str, str], tmp_path: Path) -> None:
    """What had come whole does not come again; huggingface_hub begins an unfinished file anew."""
    total = hub.add(REPO, large_model())
    hub.hold_after = HELD

    async def test(downloads: Downloads) -> None:
        job = downloads.start(REPO)
        await until(lambda: job.downloaded_bytes >= 12 * MIB)
        assert len(processes_of_downloads()) == 1
        assert await downloads.cancel(job.job_id) is job
        assert (job.status, job.path, job.error) == ("cancelled", None, None)
        assert job.completed_at is not None
        assert not processes_of_downloads()
        assert not list((tmp_path / "hub").rglob("*.incomplete"))
        assert await downloads.cancel(job.job_id) is job
        assert job.status == "cancelled"

        hub.released.set()
        again = downloads.start(REPO)
        await asyncio.wait_for(again.decided.wait(), PATIENCE)
        assert again.downloaded_bytes >= 2 * MIB
        await downloads.wait(again.job_id)
        assert (again.status, again.downloaded_bytes) == ("completed", total)
        fetched = [request.rpartition("/")[2] for request in hub.requests if request.startswith(f"GET /{REPO}/resolve")]
        shards = sorted(name for name in fetched if name != "config.json")
        assert shards == ["model-00001-of-00002.safetensors", *2 * ["model-00002-of-00002.safetensors"]]
        assert hub.bytes_served < 2 * total

    run(test, environ)


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


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "../a",
        "a/..",
        "a/b..c",
        "a b",
        "a/b\n",
        "-a/b",
        "a/-b",
        "a--b/c",
        "a/b.git",
        "a/b@main",
    ]
    + ["https://hub/a/b", "file:a", "~/a", ".", "a/.b", "a\\b", "ä/b", "a/" + "b" * 97, "a/b?c", "a/b#c", "a/b%2e"],
)
def test_names_that_cannot_be(environ: dict[str, str], name: str) -> None:
    async def test(downloads: Downloads) -> None:
        for asked in ({"model": name}, {"model": REPO, "revision": name or " "}, {"model": REPO, "quantization": name}):
            field = list(asked)[-1]
            if field == "revision" and name in ("a/b/c", "a--b/c", "a/b.git", "a/-b", "a/" + "b" * 97):
                continue  # a branch may be called so
            with pytest.raises(InvalidRequest, match=f"^{field} must be") as error:
                downloads.start(**asked)
            assert error.value.param == field

    run(test, environ)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_an_offline_server_does_not_download(environ: dict[str, str], name: str) -> None:
    async def test(downloads: Downloads) -> None:
        with pytest.raises(DownloadRefused, match="HF_HUB_OFFLINE is set"):
            downloads.start(REPO)

    run(test, {**environ, name: "true"})


def test_whoever_asks_for_the_same_gets_the_same_job(hub: HubStandIn, environ: dict[str, str]) -> None:
    total = hub.add(REPO, {"config.json": b"{}", "m-Q8_0.gguf": b"eight" * 1000, "m-Q4_K_M.gguf": b"four"})
    hub.hold_after = 100

    async def test(downloads: Downloads) -> None:
        job = downloads.start(REPO, quantization="Q8_0")
        assert downloads.start(REPO, "main", "q8_0") is job
        await until(lambda: hub.bytes_served >= 102)
        assert downloads.start(REPO, quantization="Q8_0") is job
        assert downloads.get(job.job_id) is job
        other = downloads.start(REPO, quantization="Q4_K_M")
        assert other is not job
        hub.released.set()
        for each in (job, other):
            assert (await downloads.wait(each.job_id)).status == "completed"
        assert downloads.start(REPO, quantization="Q8_0") is not job

    run(test, environ)
    assert hub.bytes_served == total


def test_two_run_sixteen_wait_and_one_more_is_refused(hub: HubStandIn, environ: dict[str, str]) -> None:
    hub.hold_after = 1
    names = [f"someone/model-{number}" for number in range(MAX_RUNNING + MAX_WAITING)]
    for name in [*names, "someone/more"]:
        hub.add(name, {"model.safetensors": name.encode()})

    async def test(downloads: Downloads) -> None:
        jobs = [downloads.start(name) for name in names]
        assert [job.waits for job in jobs] == [False] * MAX_RUNNING + [True] * MAX_WAITING
        with pytest.raises(QueueFull, match="2 downloads run and 16 wait"):
            downloads.start("someone/more")
        assert downloads.start(names[-1]) is jobs[-1]
        await until(lambda: hub.bytes_served == MAX_RUNNING)
        assert len(processes_of_downloads()) == MAX_RUNNING
        assert [job.status for job in jobs] == ["downloading"] * len(jobs)

        assert (await downloads.cancel(jobs[2].job_id)).status == "cancelled"  # one that waits
        more = downloads.start("someone/more")
        await downloads.cancel(jobs[0].job_id)  # one that runs: the next has its turn
        await until(lambda: hub.bytes_served == MAX_RUNNING + 1)
        assert (jobs[3].waits, jobs[4].waits, more.waits) == (False, True, True)
        hub.released.set()
        await asyncio.gather(*(downloads.wait(job.job_id) for job in (jobs[1], jobs[3])))
        assert [jobs[1].status, jobs[3].status] == ["completed", "completed"]

    run(test, environ)


def test_jobs_that_have_ended_are_remembered_for_a_while(environ: dict[str, str]) -> None:
    async def test(downloads: Downloads) -> None:
        ids = []
        for _ in range(MAX_REMEMBERED + 1):
            ids.append(downloads.start(REPO).job_id)
            await downloads.cancel(ids[-1])
        with pytest.raises(JobNotFound, match=ids[0]):
            downloads.get(ids[0])
        assert {downloads.get(job_id).status for job_id in ids[1:]} == {"cancelled"}
        for use in (downloads.wait, downloads.cancel):
            with pytest.raises(JobNotFound):
                await use("job_of_nobody")

    run(test, environ)


def test_a_process_that_is_killed_fails_its_job_alone(hub: HubStandIn, environ: dict[str, str], tmp_path: Path) -> None:
    total = hub.add(REPO, large_model())
    hub.hold_after = HELD

    async def test(downloads: Downloads) -> None:
        job = downloads.start(REPO)
        await until(lambda: job.downloaded_bytes >= 12 * MIB)
        (process,) = processes_of_downloads()
        process.kill()
        await downloads.wait(job.job_id)
        assert (job.status, job.path) == ("failed", None)
        assert job.error == "The process of the download ended by itself (exit code -9)."
        assert not list((tmp_path / "hub").rglob("*.incomplete"))
        hub.released.set()
        again = await download(downloads)
        assert (again.status, again.downloaded_bytes) == ("completed", total)

    run(test, environ)


PARENT = """
import asyncio, sys, uvloop
from lmserve.models.downloads import Downloads
async def main():
    job = Downloads().start(sys.argv[1])
    while job.downloaded_bytes < 12 << 20:
        await asyncio.sleep(0.01)
    print(flush=True)
    await asyncio.sleep(1000)
uvloop.run(main())
"""


def test_no_download_survives_a_killed_server(hub: HubStandIn, environ: dict[str, str], tmp_path: Path) -> None:
    """And the next one clears away what the two left."""
    total = hub.add(REPO, large_model())
    hub.hold_after = HELD
    with subprocess.Popen([sys.executable, "-c", PARENT, REPO], stdout=subprocess.PIPE, env=environ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"\n"
        (process,) = processes_of_downloads(psutil.Process(parent.pid))
        parent.kill()
        _, alive = psutil.wait_procs([process], timeout=10)
        assert not alive
    (left_over,) = (tmp_path / "hub").rglob("*.incomplete")
    hub.released.set()

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.downloaded_bytes) == ("completed", total)
        assert not os.path.lexists(left_over)

    run(test, environ)
