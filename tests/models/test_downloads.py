"""The jobs, with real processes, the real huggingface_hub, and a stand-in for the hub."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lmserve.errors import (
    DownloadRefused,
    InvalidRequest,
    JobNotFound,
    QueueFull,
)
from lmserve.models.downloads import MAX_REMEMBERED, MAX_RUNNING, MAX_WAITING, Downloads
from tests.hub_stand_in import HubStandIn
from tests.models.downloading import (
    HELD,
    MIB,
    PATIENCE,
    REPO,
    download,
    large_model,
    processes_of_downloads,
    run,
    until,
)
from tests.processes import still_running


def test_how_far_it_is(hub: HubStandIn, environ: dict[str, str]) -> None:
    """Figures that rise, stand still while nothing comes, and end at the whole."""
    total = hub.add(REPO, large_model())
    hub.hold_after = HELD
    seen: list[int] = []

    async def test(downloads: Downloads) -> None:
        job = downloads.start(REPO)
        assert (job.downloaded_bytes, job.total_bytes) == (0, 0)
        await asyncio.wait_for(job.decided.wait(), PATIENCE)
        assert job.total_bytes == total

        def look() -> bool:
            seen.append(job.downloaded_bytes)
            return job.downloaded_bytes >= 12 * MIB + len(b"{}")

        await until(look)
        assert job.downloaded_bytes == 12 * MIB + len(b"{}")
        assert job.bytes_per_second > 0
        assert (job.estimated_completion or 0) > job.started_at
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
        assert not still_running([process])
    (left_over,) = (tmp_path / "hub").rglob("*.incomplete")
    hub.released.set()

    async def test(downloads: Downloads) -> None:
        job = await download(downloads)
        assert (job.status, job.downloaded_bytes) == ("completed", total)
        assert not os.path.lexists(left_over)

    run(test, environ)
