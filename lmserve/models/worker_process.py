"""Starting one worker process, loading its model, ending it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lmserve.config import ModelConfig
from lmserve.engine.async_engine import AsyncEngine, read_message
from lmserve.engine.messages import PROTOCOL_VERSION, Hello, Load, LoadFailed, LoadProgress, Ready, encode
from lmserve.errors import ModelLoadFailed, WorkerDied

TERMINATE_SECONDS = 5.0
WORKER_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # Without it MKL's float32 products depend on how a thread's buffer is aligned, so that a request's logits have
        # other last bits in other company (Intel calls the remedy conditional numerical reproducibility).
        "MKL_CBWR": "AUTO",
    }
)
"""What a worker's libraries are told. The user's own values win."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker that has its model loaded, and the engine that talks to it."""

    process: subprocess.Popen[bytes]
    engine: AsyncEngine

    async def stop(self) -> None:
        """Ends the process: by message, then by force."""
        self.engine.shut_down()
        await end_process(self.process, grace=TERMINATE_SECONDS)


async def start_worker(config: ModelConfig, progress: Progress) -> WorkerProcess:
    """Starts a process and waits until its model is loaded. A cancelled start leaves no process behind.

    Raises:
        ModelLoadFailed: the model cannot be loaded; trying again would not help.
        WorkerDied: the process ended by itself while loading.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmserve.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**WORKER_ENVIRONMENT, **os.environ},
            start_new_session=True,  # a Ctrl-C at the terminal is the API process's to handle
        )
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        info = await _load(reader, writer, config, progress)
    except BaseException as error:
        writer.close()
        await end_process(process, grace=0.0)
        if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
            code = process.returncode
            raise WorkerDied(
                f"The worker of model {config.model_id} ended while loading (exit code {code})."
            ) from error
        raise
    engine = AsyncEngine(reader, writer, info.info, max_waiting=config.max_waiting, name=config.model_id)
    return WorkerProcess(process, engine)


async def _load(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, config: ModelConfig, progress: Progress
) -> Ready:
    hello = await read_message(reader)
    assert isinstance(hello, Hello)
    assert hello.version == PROTOCOL_VERSION
    writer.write(encode(Load(PROTOCOL_VERSION, config.to_options())))
    while True:
        message = await read_message(reader)
        if isinstance(message, Ready):
            return message
        if isinstance(message, LoadFailed):
            raise ModelLoadFailed(message.reason)
        assert isinstance(message, LoadProgress)
        progress(message.stage, message.fraction)


async def end_process(process: subprocess.Popen[bytes], grace: float) -> None:
    """Waits ``grace`` seconds for the process to end by itself, then kills it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(process.wait, grace)
        return
    process.kill()
    await asyncio.to_thread(process.wait)
