"""Starting one worker process, asking what a model would take, loading it, ending it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType

import psutil

from lmserve.config import ModelConfig
from lmserve.engine.async_engine import AsyncEngine, read_message
from lmserve.engine.messages import (
    PROTOCOL_VERSION,
    FromWorker,
    Hello,
    Load,
    LoadFailed,
    LoadProgress,
    Plan,
    Planned,
    Ready,
    ToWorker,
    encode,
)
from lmserve.errors import LMServeError, ModelLoadFailed, WorkerDied
from lmserve.runtime.interface import MemoryPlan

TERMINATE_SECONDS = 5.0
LAST_WORDS_SECONDS = 1.0
"""For what an ended worker has written still; a process that it started may keep the pipe open."""
LINE_BYTES = 1 << 16
"""What a worker may write to its standard error without a line's end before it counts as a line."""
WORKER_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # Without it MKL's float32 products depend on how a thread's buffer is aligned, so that a request's logits have
        # other last bits in other company (Intel calls the remedy conditional numerical reproducibility).
        "MKL_CBWR": "AUTO",
    }
)
"""What a worker's libraries are told. The user's own values win."""
BESIDE_IMAGES_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # OpenMP's threads wait for each other in a loop, for a long time if they may. With one more busy process than
        # there are cores (one that decodes images, say) every step then takes ten times as long, with this count three
        # or four times. Lower ones are better beside others and worse alone (``benchmarks/images.py`` shows both).
        "GOMP_SPINCOUNT": "5000",
    }
)
"""And those of a worker whose model reads images."""

Progress = Callable[[str, float], None]
Say = Callable[[int, str], None]
"""Takes the process id and a line that the worker wrote to its standard error."""


class Worker:
    """A process without a model, then with one. Owns the process and the connection to it.

    What it writes to its standard error goes to ours, and line by line to ``say``.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lines: asyncio.Task[None],
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer
        self._lines = lines
        self._engine: AsyncEngine | None = None

    @classmethod
    async def start(cls, say: Say, *, beside_images: bool = False) -> Worker:
        """Returns when the process can be talked to. A cancelled start leaves no process behind.

        ``beside_images``: other processes will look at images for this one.

        Raises:
            WorkerDied: it ended by itself.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lmserve.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**WORKER_ENVIRONMENT, **(BESIDE_IMAGES_ENVIRONMENT if beside_images else {}), **os.environ},
                start_new_session=True,  # a Ctrl-C at the terminal is the API process's to handle
            )
        ours.setblocking(False)
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            _close(process)
            raise
        worker = cls(process, reader, writer, asyncio.create_task(_forward_lines(process, say)))
        try:
            hello = await worker._receive()
        except BaseException:
            await worker.stop(grace=0.0)
            raise
        assert isinstance(hello, Hello)
        assert hello.version == PROTOCOL_VERSION
        return worker

    @property
    def engine(self) -> AsyncEngine:
        """Of the loaded model."""
        assert self._engine is not None, "load comes first"
        return self._engine

    @property
    def resident_bytes(self) -> int:
        """Memory that the process has now; 0 when it has ended."""
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def plan(self, config: ModelConfig, reserved_bytes: int) -> MemoryPlan:
        """What the model would take of what is free now, less what is reserved.

        Raises:
            ModelLoadFailed: it cannot be loaded, whatever is free.
            WorkerDied: the process ended.
        """
        self._send(Plan(config.to_options(), reserved_bytes))
        message = await self._receive()
        assert isinstance(message, Planned), type(message).__name__
        return message.plan

    async def load(self, config: ModelConfig, reserved_bytes: int, progress: Progress) -> None:
        """Returns when the model can answer. Raises as ``plan`` does."""
        self._send(Load(config.to_options(), reserved_bytes))
        while not isinstance(message := await self._receive(), Ready):
            assert isinstance(message, LoadProgress), type(message).__name__
            progress(message.stage, message.fraction)
        self._engine = AsyncEngine(
            self._reader, self._writer, message.info, max_waiting=config.max_waiting, name=config.model_id
        )

    async def stop(self, reason: LMServeError | None = None, grace: float = TERMINATE_SECONDS) -> None:
        """Ends the process: by message, then by force. ``reason``: what requests that still run are told."""
        if self._engine is not None:
            self._engine.shut_down(reason)
        else:  # it may be reading weights, and hears nothing
            self._writer.close()
            grace = 0.0
        await end_process(self.process, grace)
        await asyncio.wait({self._lines}, timeout=LAST_WORDS_SECONDS)
        self._lines.cancel()
        await asyncio.gather(self._lines, return_exceptions=True)
        _close(self.process)

    def _send(self, message: ToWorker) -> None:
        self._writer.write(encode(message))

    async def _receive(self) -> FromWorker:
        try:
            message = await read_message(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await end_process(self.process, grace=TERMINATE_SECONDS)
            raise WorkerDied(f"The worker ended while loading (exit code {self.process.returncode}).") from error
        if isinstance(message, LoadFailed):
            raise ModelLoadFailed(message.reason)
        return message


async def end_process(process: subprocess.Popen[bytes], grace: float) -> None:
    """Waits ``grace`` seconds for the process to end by itself, then kills it."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, grace)
    finally:
        if process.poll() is None:  # also when whoever waits here is cancelled
            process.kill()
    await asyncio.to_thread(process.wait)


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    process.stderr.close()


def _say_line(pid: int, line: bytes, say: Say) -> None:
    if text := line.decode("utf-8", "replace").rstrip():
        say(pid, text)


async def _forward_lines(process: subprocess.Popen[bytes], say: Say) -> None:
    """Until the process and all who inherited its standard error have ended."""
    assert process.stderr is not None
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stderr
    )
    rest = b""
    try:
        while piece := await reader.read(LINE_BYTES):
            with contextlib.suppress(OSError, ValueError):  # nobody reads ours any more
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
            *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                _say_line(process.pid, line, say)
        _say_line(process.pid, rest, say)
    finally:
        transport.close()
