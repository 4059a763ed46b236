"""Starting and ending, with real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.contenders import Machine
from benchmarks.contenders import lmserve_command as command_for
from lmserve.cli.bench.process import Server, StartFailed, foreign_command, free_port, lmserve_command

# A server that is ready after a moment and has a child of its own; the child's id is its answer.
SERVER = """
import http.server, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(child.pid).encode())
    def log_message(self, *_): pass
time.sleep(0.3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_server_is_ready_inside_and_gone_with_its_children_after() -> None:
    port = free_port()
    with Server([sys.executable, "-c", SERVER, str(port)], port, dict(os.environ)) as server:
        child = int(httpx.get(f"{server.base_url}/health", trust_env=False).text)
        assert is_alive(child)
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.base_url}/health", trust_env=False)


def test_a_server_that_does_not_start_is_quoted() -> None:
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with pytest.raises(StartFailed, match=r"ended with code 3:\nno such model"), Server(command, 1, {}):
        pass


def test_what_cannot_be_started_is_said() -> None:
    with pytest.raises(StartFailed, match="no-such-program cannot be started"), Server(["no-such-program"], 1):
        pass


def test_memory_is_that_of_all_its_processes() -> None:
    port = free_port()
    with Server([sys.executable, "-c", SERVER, str(port)], port) as server:
        assert server.memory_bytes() > 10 * 2**20, "two interpreters"
        assert server.ready_seconds > 0


def test_commands() -> None:
    assert lmserve_command("m", 5, ["--threads", "3"])[1:] == [
        *("-m", "lmserve", "serve", "m", "--port", "5", "--threads", "3")
    ]
    assert foreign_command("serve 'my model' --port={port}", 7) == ["serve", "my model", "--port=7"]
    machine = Machine("m", "cpu", "float32", 3)
    assert command_for(machine, 5)[-6:] == ["--dtype", "float32", "--device", "cpu", "--threads", "3"]
    assert machine.environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("template", ["serve --port 80", "serve '{port}"])
def test_a_command_without_a_port_is_refused(template: str) -> None:
    with pytest.raises(StartFailed, match="--command"):
        foreign_command(template, 7)
