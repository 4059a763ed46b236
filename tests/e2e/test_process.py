"""The life of the processes: start, failure to start, idleness, a worker's death, drain, ends of every kind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.serving import Server, start
from tests.processes import still_running

IDLE_SECONDS = 5.0
IDLE_SHARE = 0.02


@pytest.fixture
def server(tmp_path: Path, tiny_folder: Path) -> Iterator[Server]:
    with start(tmp_path, str(tiny_folder), "--max-model-len", "2000", "--threads", "1") as running:
        yield running


def long_stream(server: Server, max_tokens: int = 1500) -> openai.Stream[openai.types.Completion]:
    return server.client().completions.create(
        model="tiny", prompt="a", max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}
    )


def fails(arguments: list[str], **environment: str) -> str:
    """Starts a server that cannot start; its words."""
    done = subprocess.run(
        [sys.executable, "-m", "lmserve", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_start_up_says_what_was_loaded_and_where(server: Server) -> None:
    deadline = time.monotonic() + 10
    while "curl" not in server.stderr.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    said = server.stderr.read_text()
    for fact in ("cpu", "float32", "M parameters", "KV cache", "2,000 tokens", f"http://127.0.0.1:{server.port}/v1"):
        assert fact in said, said


def test_a_missing_model_ends_the_start(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in fails([str(tmp_path / "nothing")])


def test_a_taken_port_ends_the_start_before_anything_is_loaded(tiny_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails([str(tiny_folder), "--port", str(port)])
    assert f"127.0.0.1:{port}" in said
    assert "loading weights" not in said


def test_a_context_that_does_not_fit_ends_the_start_with_the_numbers(tiny_folder: Path) -> None:
    said = fails([str(tiny_folder), "--port", "0", "--kv-cache-memory", "64KiB", "--max-model-len", "4000"])
    assert "max_model_len 4000 needs" in said


def test_idle_costs_no_processor_time(server: Server) -> None:
    server.client().completions.create(model="tiny", prompt="a", max_tokens=5)
    time.sleep(1.0)  # torch's threads spin for a moment after work
    processes = [psutil.Process(server.process.pid), *server.workers()]
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(IDLE_SECONDS)
    used = [sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True)]
    assert max(used) < IDLE_SHARE * IDLE_SECONDS, used


def test_a_killed_worker_costs_its_requests_an_error_and_comes_back(server: Server) -> None:
    (worker,) = server.workers()
    stream = long_stream(server)
    next(iter(stream))
    worker.kill()
    with pytest.raises(openai.APIError, match="worker"):
        for _ in stream:
            pass
    stream.close()
    with pytest.raises(openai.APIStatusError) as refused:
        server.client().completions.create(model="tiny", prompt="a", max_tokens=5)
    assert refused.value.status_code == 503
    assert float(refused.value.response.headers["retry-after"]) > 0
    server.wait_ready()
    assert server.client().completions.create(model="tiny", prompt="a", max_tokens=5).usage is not None
    assert [p.pid for p in server.workers()] != [worker.pid]


def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(server: Server) -> None:
    stream = long_stream(server)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert httpx.get(f"{server.url}/health").status_code == 503
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(20) == 0


def test_a_second_signal_ends_at_once(server: Server) -> None:
    stream = long_stream(server)
    next(iter(stream))
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15) == 0
    stream.close()


def test_no_worker_survives_a_killed_server(server: Server) -> None:
    workers = server.workers()
    assert workers
    server.process.kill()
    assert not still_running(workers)


def test_no_worker_survives_a_server_killed_while_loading(tmp_path: Path, tiny_folder: Path) -> None:
    with start(tmp_path, str(tiny_folder), ready=False) as server:
        deadline = time.monotonic() + 60
        while not (workers := server.workers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers
        server.process.kill()
        assert not still_running(workers)


def test_health_says_why_not_while_loading(tmp_path: Path, tiny_folder: Path) -> None:
    with start(tmp_path, str(tiny_folder), ready=False) as server:
        answers: set[int] = set()
        deadline = time.monotonic() + 60
        while 503 not in answers and time.monotonic() < deadline:
            try:
                answer = httpx.get(f"{server.url}/health")
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            answers.add(answer.status_code)
            if answer.status_code == 503:
                assert "tiny" in answer.text
                assert "retry-after" in answer.headers
        assert 503 in answers


class LogListener:
    """Collects the log stream's events in a thread, to the first output, or to one with so many inputs."""

    def __init__(self, url: str, last: str = "llm.prediction.output", num_inputs: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.has_input = threading.Event()
        self._url = url
        self._last = (last, num_inputs)
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        assert self._connected.wait(30)

    def wait(self) -> list[dict[str, Any]]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.events

    def _listen(self) -> None:
        with httpx.stream("GET", f"{self._url}/log/stream", timeout=60) as answer:
            self._connected.set()
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    self.events.append(json.loads(line[5:]))
                    self.has_input.set()
                    if (self.events[-1]["type"], self.events[-1].get("inputsCount")) == self._last:
                        return


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_stops_the_work(server: Server, streaming: bool) -> None:
    """The log stream says that the prediction was stopped, long before it would have ended."""
    log = LogListener(server.url)
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1900, "stream": streaming, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}\r\n\r\n{body}".encode())
        assert log.has_input.wait(30)
        if streaming:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
    stats = log.wait()[-1]["stats"]
    assert stats["stopReason"] == "userStopped"
    assert stats["predictedTokensCount"] < 1900
    again = server.client().completions.create(model="tiny", prompt="a", max_tokens=3)
    assert again.usage is not None
