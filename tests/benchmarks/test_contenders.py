"""Starting and ending, with real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.contenders import (
    ContenderError,
    Machine,
    Server,
    free_port,
    generate_one_by_one,
    lmserve_command,
    transformers_command,
)

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
    with pytest.raises(ContenderError, match=r"ended with code 3:\nno such model"), Server(command, 1, {}):
        pass


def test_every_contender_gets_the_same_machine() -> None:
    machine = Machine("/models/m", "cpu", "float32", 3)
    for command in (lmserve_command(machine, 1234), transformers_command(machine, 1234)):
        assert command[1:3] == ["serve", "/models/m"]
        options = dict(zip(command, command[1:], strict=False))
        assert (options["--port"], options["--dtype"], options["--device"]) == ("1234", "float32", "cpu")
    assert machine.environment["OMP_NUM_THREADS"] == "3"
    assert lmserve_command(machine, 1234)[-2:] == ["--threads", "3"]


def test_generate_answers_each_prompt_in_full(tiny_folder: Path) -> None:
    timings = generate_one_by_one(Machine(str(tiny_folder), "cpu", "float32", 1), ["hello", "you there"], 5)
    assert [timing.completion_tokens for timing in timings] == [5, 5]
    assert timings[0].prompt_tokens < timings[1].prompt_tokens
    assert timings[0].sent < timings[0].first_token < timings[0].last_token <= timings[1].sent


def test_a_generate_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match="model.generate failed"):
        generate_one_by_one(Machine(str(tmp_path), "cpu", "float32", 1), ["hello"], 5)
