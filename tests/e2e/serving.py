"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

from lmserve.cli.bench.process import free_port
from tests.processes import still_running

START_SECONDS = 120.0


@dataclass
class Server:
    """A running server; ``stderr`` is a file that holds what it has said to the person who started it."""

    process: subprocess.Popen[bytes]
    port: int
    stderr: Path
    scheme: str = "http"
    uds: Path | None = None
    clients: list[OpenAI] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def client(self, **options: object) -> OpenAI:
        settings: dict[str, object] = {"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 120}
        self.clients.append(OpenAI(**{**settings, **options}))  # type: ignore[arg-type]  # a table of mixed values
        return self.clients[-1]

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_ready(self) -> None:
        """Returns when /health is 200; fails with the server's own words when it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if self._health() == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready (exit code {self.process.poll()}):\n{self.stderr.read_text()}")

    def _health(self) -> int:
        if self.uds is not None and "listens on" not in self.stderr.read_text():
            return 0
        transport = httpx.HTTPTransport(uds=None if self.uds is None else str(self.uds), verify=False)
        with httpx.Client(transport=transport) as http:
            return http.get(f"{self.url}/health").status_code


@contextlib.contextmanager
def start(
    folder: Path, *arguments: str, ready: bool = True, scheme: str = "http", uds: Path | None = None, **environment: str
) -> Iterator[Server]:
    """``lmserve serve`` with the arguments, on a free port. Ends it and asserts that no worker outlives it.

    ``scheme`` and ``uds``: how it can be reached, if the arguments say so.
    """
    port = free_port()
    stderr = folder / f"stderr-{port}.txt"
    with stderr.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmserve", "serve", "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
    server = Server(process, port, stderr, scheme, uds)
    workers: list[psutil.Process] = []
    try:
        if ready:
            server.wait_ready()
            workers = server.workers()
        yield server
    finally:
        for client in server.clients:
            client.close()
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    alive = still_running(workers)
    assert not alive, f"workers outlived the server: {alive}"
