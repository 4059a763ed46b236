"""Downloads from the Hugging Face hub: the jobs, and the processes that do them."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmserve.errors import (
    DownloadRefused,
    HubUnreachable,
    InvalidRequest,
    JobNotFound,
    LMServeError,
    ModelNotFound,
    QueueFull,
)
from lmserve.models.hub_cache import remove_orphans
from lmserve.models.hub_messages import Done, Failed, Message, Plan, decode
from lmserve.models.worker_process import end_process

MAX_RUNNING = 2
MAX_WAITING = 16
MAX_REMEMBERED = 100
"""Jobs that have ended."""
DEFAULT_REVISION = "main"
RETRY_AFTER_SECONDS = 30.0
EXIT_SECONDS = 5.0
RATE_SECONDS = 10.0
"""The rate is the mean of so long."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_MODEL = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_REVISION = 200
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})

logger = logging.getLogger(__name__)

Status = Literal["downloading", "completed", "already_downloaded", "failed", "cancelled"]


@dataclass(eq=False)
class Job:
    """One download. Sizes in bytes, times in seconds since the epoch."""

    job_id: str
    model: str
    revision: str
    quantization: str | None
    waits: bool = False
    """For its turn."""
    is_cancelled: bool = False
    """It was told to end."""
    status: Status = "downloading"
    total_bytes: int = 0
    """0 until the hub has told."""
    downloaded_bytes: int = 0
    """With what was in the cache. Never falls."""
    bytes_per_second: float = 0.0
    """While it runs the rate of the last seconds, afterwards the mean."""
    started_at: float = field(default_factory=time.time)
    completed_at: float | None = None
    storage: Path | None = None
    """The repository's folder in the cache, once that is known."""
    path: str | None = None
    """The model's folder, once it is complete."""
    error: str | None = None
    refusal: LMServeError | None = None
    """Why it failed before the first byte."""
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is known what there is to download, and when the job has ended."""
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has ended and its process is gone."""
    _marks: deque[tuple[float, int]] = field(default_factory=deque)
    _first: tuple[float, int] | None = None

    @property
    def has_ended(self) -> bool:
        return self.status != "downloading"

    @property
    def estimated_completion(self) -> float | None:
        if self.has_ended or not self.bytes_per_second:
            return None
        return time.time() + (self.total_bytes - self.downloaded_bytes) / self.bytes_per_second

    def plan(self, plan: Plan) -> None:
        self.total_bytes, self.storage = plan.total, Path(plan.storage)
        self.progress(plan.downloaded)
        self.decided.set()

    def progress(self, downloaded: int) -> None:
        self.downloaded_bytes = max(self.downloaded_bytes, downloaded)
        mark = (time.monotonic(), self.downloaded_bytes)
        self._first = self._first or mark
        self._marks.append(mark)
        while mark[0] - self._marks[0][0] > RATE_SECONDS:
            self._marks.popleft()
        self.bytes_per_second = _rate(self._marks[0], mark)

    def end(self, status: Status, *, path: str | None = None, error: str | None = None) -> None:
        self.status, self.path, self.error = status, path, error
        self.completed_at = time.time()
        if self._first is not None:
            self.bytes_per_second = _rate(self._first, (time.monotonic(), self.downloaded_bytes))
        self.decided.set()


class Downloads:
    """Owns the jobs. Two run at a time, each in a process of its own; the others wait their turn.

    Belongs to one event loop. ``environ`` is what the processes are started with, and where huggingface_hub finds
    endpoint, cache and token; ``on_completed`` is called after each job that left a model in the cache.
    """

    def __init__(
        self, on_completed: Callable[[Job], None] | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self._on_completed = on_completed
        self._environ = environ
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(MAX_RUNNING)

    def start(self, model: str, revision: str | None = None, quantization: str | None = None) -> Job:
        """Begins a download, or finds the one that is under way. Returns at once.

        Raises:
            InvalidRequest: a name that cannot be one.
            DownloadRefused: the server is told to stay offline.
            QueueFull: too many wait.
        """
        revision = revision or DEFAULT_REVISION
        _check_names(model, revision, quantization)
        offline = self._environ.get("HF_HUB_OFFLINE") or self._environ.get("TRANSFORMERS_OFFLINE") or ""
        if offline.upper() in _TRUE:
            raise DownloadRefused("This server does not download: HF_HUB_OFFLINE is set in its environment.")
        for job in self._jobs.values():
            asked = (job.model, job.revision, (job.quantization or "").lower())
            if not job.has_ended and asked == (model, revision, (quantization or "").lower()):
                return job
        if len(self._tasks) >= MAX_RUNNING + MAX_WAITING:
            raise QueueFull(
                f"{MAX_RUNNING} downloads run and {MAX_WAITING} wait; this server takes no more.", RETRY_AFTER_SECONDS
            )
        waits = len(self._tasks) >= MAX_RUNNING
        job = Job(f"job_{uuid.uuid4().hex}", model, revision, quantization, waits)
        self._jobs[job.job_id] = job
        task = self._tasks[job.job_id] = asyncio.create_task(self._run(job), name=f"download {model}")
        task.add_done_callback(lambda task: self._ended(job, task))
        return job

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound: there is none, or it ended long ago."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobNotFound(f"No download has the id {job_id[:64]!r}.", "job_id")
        return job

    async def wait(self, job_id: str) -> Job:
        """The job, when it has ended. Raises as ``get``."""
        job = self.get(job_id)
        await job.finished.wait()
        return job

    async def cancel(self, job_id: str) -> Job:
        """Ends the job; what it has brought whole stays in the cache. One that has ended is left as it is.

        Returns when its process is gone. Raises as ``get``.
        """
        job = self.get(job_id)
        task = self._tasks.get(job_id)
        if task is not None and not job.has_ended and not job.is_cancelled:
            job.is_cancelled = True
            task.cancel()
        return await self.wait(job_id)

    async def close(self) -> None:
        """Cancels every job. No process is left behind."""
        await asyncio.gather(*(self.cancel(job_id) for job_id in list(self._tasks)))

    async def _run(self, job: Job) -> None:
        async with self._turns:
            job.waits = False
            process, sock = _start_process(job, self._environ)
            try:
                await _follow(job, sock)
            except BaseException:
                process.kill()
                raise
            finally:
                await _also_if_cancelled(asyncio.create_task(_clean_up(job, process)))
        if not job.has_ended:
            job.end("failed", error=f"The process of the download ended by itself (exit code {process.returncode}).")

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        del self._tasks[job.job_id]
        if not job.has_ended:
            if task.cancelled():
                job.end("cancelled")
            else:
                logger.error("The download of %s failed.", job.model, exc_info=task.exception())
                job.end("failed", error="The download failed. The server's log has the details.")
        job.finished.set()
        self._jobs[job.job_id] = self._jobs.pop(job.job_id)  # in the order of their ends
        ended = [job_id for job_id, job in self._jobs.items() if job.has_ended]
        for job_id in ended[:-MAX_REMEMBERED]:
            del self._jobs[job_id]
        if job.path is not None and self._on_completed is not None:
            self._on_completed(job)


def _check_names(model: str, revision: str, quantization: str | None) -> None:
    if _MODEL.fullmatch(model) is None or ".." in model or "--" in model or model.endswith(".git"):
        raise InvalidRequest("model must be a name on the hub: publisher/model, or model alone.", "model")
    if len(revision) > _MAX_REVISION or _REVISION.fullmatch(revision) is None or ".." in revision:
        raise InvalidRequest("revision must be the name of a branch or a tag, or a commit.", "revision")
    if quantization is not None and _QUANTIZATION.fullmatch(quantization) is None:
        raise InvalidRequest("quantization must be a word in a file's name, such as Q4_K_M.", "quantization")


def _start_process(job: Job, environ: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process, and the socket on which it says what it does."""
    words = [job.model, job.revision, *([job.quantization] if job.quantization is not None else [])]
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "lmserve.models.hub_download", *words],
                stdin=subprocess.DEVNULL,
                stdout=theirs.fileno(),
                env={**environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # a Ctrl-C at the terminal is the API process's to handle
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


async def _follow(job: Job, sock: socket.socket) -> None:
    """Applies what the process says, until it closes its output."""
    sock.setblocking(False)
    try:
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        while line := await reader.readline():
            _apply(job, decode(line))
    finally:
        writer.close()


async def _clean_up(job: Job, process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of the process, which is ending or killed, and deletes what it left unfinished."""
    await end_process(process, grace=EXIT_SECONDS)
    if job.path is None and job.storage is not None:
        await asyncio.to_thread(remove_orphans, job.storage)


async def _also_if_cancelled(work: asyncio.Task[None]) -> None:
    """Waits until it is done; a cancellation that comes meanwhile goes on afterwards. There is never a second one."""
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


def _apply(job: Job, message: Message) -> None:
    if isinstance(message, Plan):
        job.plan(message)
    elif isinstance(message, Done):
        job.total_bytes = job.downloaded_bytes = message.total
        job.end("already_downloaded" if message.already else "completed", path=message.path)
    elif isinstance(message, Failed):
        if not job.decided.is_set():
            job.refusal = _refusal(message)
        job.end("failed", error=message.message)
    else:
        job.progress(message.downloaded)


def _refusal(failed: Failed) -> LMServeError | None:
    if failed.kind == "not_found":
        return ModelNotFound(failed.message, failed.param)
    if failed.kind == "invalid":
        return InvalidRequest(failed.message, failed.param)
    if failed.kind in ("forbidden", "no_space"):
        return DownloadRefused(failed.message, failed.param)
    return HubUnreachable(failed.message, RETRY_AFTER_SECONDS) if failed.kind == "unreachable" else None


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    seconds = last[0] - first[0]
    return (last[1] - first[1]) / seconds if seconds > 0 else 0.0
