"""A server that is started to be measured, and ended again: it and what it started, nothing else."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType

import httpx
import psutil

from lmserve.errors import LMServeError

START_SECONDS = 600.0
STOP_SECONDS = 20.0
LAST_WORDS = 2000


class StartFailed(LMServeError):
    """A process did not start or did not do its work; the message ends with what it wrote last."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def lmserve_command(model: str, port: int, options: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-m", "lmserve", "serve", model, "--port", str(port), *options]


def foreign_command(template: str, port: int) -> list[str]:
    """Somebody else's server; ``{port}`` stands for the port that it is to listen on.

    Raises:
        StartFailed: the command has no ``{port}``, or no end of a quotation.
    """
    try:
        parts = shlex.split(template)
    except ValueError as error:
        raise StartFailed(f"--command: {error}") from error
    if not any("{port}" in part for part in parts):
        raise StartFailed("--command: {port} has to stand where the port is named")
    return [part.replace("{port}", str(port)) for part in parts]


class Server(AbstractContextManager["Server"]):
    """A server process; inside ``with`` it answers on ``base_url``. Leaving ends it and all that it started.

    Raises StartFailed on entering.
    """

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str] = os.environ) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.ready_seconds = 0.0
        self._command, self._environment = list(command), dict(environment)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process runs, see _stop
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that its workers end with it
            )
        except OSError as error:
            self._output.close()
            raise StartFailed(f"{self._command[0]} cannot be started: {error}") from error
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        self.ready_seconds = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def memory_bytes(self) -> int:
        """Resident memory of the process and all that it started; what they share counts for each."""
        assert self._process is not None
        total = 0
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            for process in (first, *first.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total

    def last_words(self) -> str:
        """The end of what the process wrote."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-LAST_WORDS:]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartFailed(f"{self._command[0]} ended with code {process.returncode}:\n{self.last_words()}")
            with suppress(httpx.TransportError):  # not listening yet
                if httpx.get(f"{self.base_url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
        raise StartFailed(f"{self._command[0]} was not ready after {START_SECONDS:.0f} s:\n{self.last_words()}")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._signal_group(self._process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        # Whatever of the group is left, also when its first process has gone.
        self._signal_group(self._process, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._output.close()

    @staticmethod
    def _signal_group(process: subprocess.Popen[bytes], which: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, which)
