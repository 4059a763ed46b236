"""Downloads of models, in LM Studio's shapes: begin one, ask how far it is, cancel it."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import datetime, timezone

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve.api.body import ignored_header, read_request
from lmserve.api.openapi import Operation
from lmserve.api.schema.manage import DownloadJob, DownloadRequest
from lmserve.api.settings import ApiSettings
from lmserve.models.downloads import Downloads, Job

BASE = "/api/v1/models/download"
DECISION_SECONDS = 15.0
"""How long an answer waits for the hub to say whether there is such a model, and how large it is."""


class DownloadsEndpoint:
    """Answers for the jobs that ``Downloads`` owns."""

    def __init__(self, downloads: Downloads, settings: ApiSettings) -> None:
        self._downloads = downloads
        self._settings = settings

    def operations(self) -> list[Operation]:
        """The paths, for the application's table."""
        status, cancel = f"{BASE}/status/{{job_id}}", f"{BASE}/cancel/{{job_id}}"
        return [
            Operation(
                "POST", BASE, self.create, "Download a model from the hub", body=DownloadRequest, answer=DownloadJob
            ),
            Operation("GET", status, self.status, "How far a download is", answer=DownloadJob),
            Operation("POST", cancel, self.cancel, "End a download; what came whole is kept", answer=DownloadJob),
        ]

    async def create(self, request: Request) -> Response:
        """What is refused before the first byte is an error here; what fails later is said by the job's status."""
        body, ignored = await read_request(request, DownloadRequest, self._settings)
        job = self._downloads.start(body.model, body.revision, body.quantization)
        if not job.waits:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(job.decided.wait(), DECISION_SECONDS)
        if job.refusal is not None:
            raise job.refusal
        return _json(job, ignored)

    async def status(self, request: Request) -> Response:
        return _json(self._downloads.get(request.path_params["job_id"]))

    async def cancel(self, request: Request) -> Response:
        """The job, when its process is gone. One that had ended is as it was."""
        return _json(await self._downloads.cancel(request.path_params["job_id"]))


def _json(job: Job, ignored: list[str] | None = None) -> Response:
    answer = DownloadJob(
        job_id=job.job_id,
        model=job.model,
        status=job.status,
        total_size_bytes=job.total_bytes,
        downloaded_bytes=job.downloaded_bytes,
        bytes_per_second=job.bytes_per_second,
        started_at=_moment(job.started_at),
        completed_at=None if job.completed_at is None else _moment(job.completed_at),
        estimated_completion=None if job.estimated_completion is None else _moment(job.estimated_completion),
        path=job.path,
        error=job.error,
    )
    return Response(msgspec.json.encode(answer), headers=ignored_header(ignored or []), media_type="application/json")


def _moment(seconds: float) -> str:
    """ISO 8601, UTC, to the millisecond."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
