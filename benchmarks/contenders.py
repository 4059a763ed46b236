"""The processes that are measured: each is started by us, and ended by us alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from benchmarks.figures import RequestTiming

START_SECONDS = 600.0
STOP_SECONDS = 20.0


class ContenderError(Exception):
    """A process did not start or did not do its work; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What every contender gets alike."""

    model: str
    device: str
    dtype: str
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}


def lmserve_command(machine: Machine, port: int) -> list[str]:
    options = ["--port", str(port), "--dtype", machine.dtype, "--device", machine.device]
    return [_installed("lmserve"), "serve", machine.model, *options, "--threads", str(machine.threads)]


def transformers_command(machine: Machine, port: int) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", machine.dtype, "--device", machine.device]
    return [_installed("transformers"), "serve", machine.model, "--continuous-batching", *options]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server(AbstractContextManager["Server"]):
    """A server process; inside ``with`` it answers on ``base_url``. Leaving ends it and all that it started."""

    def __init__(self, command: Sequence[str], port: int, environment: dict[str, str]) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self._command, self._environment = command, environment
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process runs, see _stop
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, so that its workers end with it
        )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def last_words(self) -> str:
        """The end of what the process wrote."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-2000:]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ContenderError(f"{self._command[0]} ended with code {process.returncode}:\n{self.last_words()}")
            try:
                if httpx.get(f"{self.base_url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
        raise ContenderError(f"{self._command[0]} was not ready after {START_SECONDS:.0f} s:\n{self.last_words()}")

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


def generate_one_by_one(machine: Machine, prompts: list[str], new_tokens: int) -> list[RequestTiming]:
    """``model.generate`` on each prompt in turn, in a process of its own."""
    job = {"model": machine.model, "device": machine.device, "dtype": machine.dtype, "threads": machine.threads}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_by_one"],
        input=json.dumps({**job, "prompts": prompts, "new_tokens": new_tokens}),
        capture_output=True,
        text=True,
        env=machine.environment,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    if done.returncode != 0:
        raise ContenderError(f"model.generate failed:\n{done.stderr[-2000:]}")
    timings: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [RequestTiming(**timing) for timing in timings]


def _installed(command: str) -> str:
    """The command that belongs to this interpreter."""
    return str(Path(sys.executable).parent / command)
