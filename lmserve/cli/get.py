"""``lmserve get``: the server downloads a model, and we watch."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer

from lmserve.api.schema.manage import DownloadJob, DownloadRequest
from lmserve.cli.client import ServerClient, connect
from lmserve.cli.options import ApiKey, AsJson, Url
from lmserve.cli.progress import Bar
from lmserve.cli.tables import format_size, print_json
from lmserve.cli.terminal import say
from lmserve.errors import LMServeError

EPILOG = """Examples:

\b
  lmserve get Qwen/Qwen2.5-0.5B-Instruct
  lmserve get bartowski/SmolLM2-135M-Instruct-GGUF --quantization Q4_K_M
  lmserve get Qwen/Qwen2.5-0.5B-Instruct --revision main --json"""
POLL_SECONDS = 0.5
EXIT_INTERRUPTED = 130


class DownloadFailed(LMServeError):
    """The server could not download it, or somebody stopped it."""


def get(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its name on the hub: publisher/model.")],
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="Branch, tag or commit.")] = None,
    quantization: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of several GGUF files the one with this in its name: Q4_K_M.")
    ] = None,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> int:
    """Download a model from the hub."""
    with connect(url, api_key) as client:
        request = DownloadRequest(model=model, revision=revision, quantization=quantization)
        job = client.post("/api/v1/models/download", DownloadJob, request)
        try:
            job = _follow(client, job)
        except KeyboardInterrupt:
            _cancel(client, job)
            return EXIT_INTERRUPTED
    if job.status in ("failed", "cancelled"):
        reason = job.error or ("somebody cancelled it" if job.status == "cancelled" else "the server does not say why")
        raise DownloadFailed(f"the download of {job.model} ended: {reason}")
    if as_json:
        print_json(job)
    place = f" in {job.path}" if job.path else ""
    if job.status == "already_downloaded":
        say(f"{job.model} is already here{place}.")
    else:
        say(f"{job.model} is here{place} ({format_size(job.total_size_bytes or job.downloaded_bytes)}).")
    say(f"Load it with: lmserve load {job.model.rpartition('/')[2].lower()}")
    return 0


def _follow(client: ServerClient, job: DownloadJob) -> DownloadJob:
    """The job once it has ended."""
    with Bar(f"Downloading {job.model}", counts_bytes=True) as bar:
        while job.status == "downloading":
            bar.show_bytes(job.downloaded_bytes, job.total_size_bytes, job.bytes_per_second)
            time.sleep(POLL_SECONDS)
            job = client.get(f"/api/v1/models/download/status/{job.job_id}", DownloadJob)
    return job


def _cancel(client: ServerClient, job: DownloadJob) -> None:
    """Whatever becomes of the request: the user wants to go."""
    with contextlib.suppress(LMServeError):
        client.post(f"/api/v1/models/download/cancel/{job.job_id}", DownloadJob)
    say("Download cancelled.")
