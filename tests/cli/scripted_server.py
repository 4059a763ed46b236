"""A server on a real port that answers as lmserve's contract says, from a state that a test writes."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmserve.api.schema.manage import (
    Capabilities,
    Device,
    DownloadJob,
    Instance,
    InstanceConfig,
    LoadAnswer,
    LoadEvent,
    LoadRequest,
    ManagedModel,
    ManagedModels,
    MemoryEstimate,
    Quantization,
    UnloadAnswer,
    UnloadRequest,
)

GIB = 2**30
HELD_SECONDS = 120.0
"""A stream that is held longer than this is given up: a test has failed."""


def managed_model(key: str, *, kind: str = "llm", **changes: Any) -> ManagedModel:
    plain = ManagedModel(
        type="llm",
        publisher=key.partition("/")[0],
        key=key,
        display_name=key.rpartition("/")[2],
        architecture="qwen2",
        quantization=Quantization("Q4_K_M", 4.5),
        size_bytes=GIB,
        params_string="1.5B",
        loaded_instances=[],
        max_context_length=32768,
        format="gguf",
        capabilities=Capabilities(vision=False, trained_for_tool_use=False),
        path=f"/models/{key}",
        source="models_dir",
        problem=None,
    )
    return msgspec.structs.replace(plain, type=kind, **changes)


def instance(name: str, **changes: Any) -> Instance:
    plain = Instance(
        id=name,
        config=InstanceConfig(4096, 512, 8, 65536, "cpu", "float32"),
        state="loaded",
        status="idle",
        stage="",
        progress=1.0,
        num_running=0,
        num_queued=0,
        just_in_time=False,
        ttl_seconds=None,
        ttl_left_seconds=None,
        memory_bytes=GIB,
        device=Device("cpu", 16 * GIB, 9 * GIB, 75.5),
        device_memory_bytes=GIB,
        cpu_percent=41.6,
        estimated_bytes=2 * GIB,
        load_time_seconds=2.5,
        lane="packed",
        lane_reason="",
        restarts=0,
        failure=None,
    )
    return msgspec.structs.replace(plain, **changes)


def estimate(model: str, *, fits: bool) -> MemoryEstimate:
    return MemoryEstimate(
        model=model,
        device="cpu",
        dtype="float32",
        context_length=4096,
        parallel=8,
        weights_bytes=4 * GIB,
        kv_cache_bytes=GIB,
        kv_cache_tokens=65536,
        activations_bytes=GIB // 2,
        fixed_bytes=GIB // 4,
        total_bytes=GIB * 23 // 4,
        free_bytes=8 * GIB,
        would_unload=["old"],
        fits=fits,
        message="It takes 5.75 GiB, and 8 GiB are free.",
    )


def download(status: str, done: int, **changes: Any) -> DownloadJob:
    plain = DownloadJob(
        job_id="job-1",
        model="Some/Model",
        status="downloading",
        total_size_bytes=GIB,
        downloaded_bytes=done,
        bytes_per_second=5e6,
        started_at="2026-01-01T00:00:00Z",
        completed_at=None,
        estimated_completion=None,
        path=None,
        error=None,
    )
    return msgspec.structs.replace(plain, status=status, **changes)


@dataclass
class Refusal:
    """An error in place of an answer."""

    status: int
    message: str
    code: str | None = None

    def body(self) -> bytes:
        error = {"message": self.message, "type": "some_error", "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()


@dataclass
class Script:
    """What the server answers, and what it was asked."""

    models: list[ManagedModel] = field(default_factory=list)
    key: str = ""
    problem: str | None = None
    """Why it is not healthy."""
    load_steps: list[tuple[float, str]] = field(default_factory=lambda: [(0.25, "weights"), (0.75, "warming up")])
    load_refusals: list[Refusal] = field(default_factory=list)
    """One for each load until there are none; forced loads get none."""
    load_ends: bool = True
    """Otherwise a load stays where its last step is until the client goes."""
    fits: bool = True
    downloads: list[DownloadJob] = field(default_factory=list)
    """One for each question; the last stays."""
    pieces: list[str | Refusal] = field(default_factory=lambda: ["Hel", "lo!"])
    """Of each answer."""
    chat_refusals: list[Refusal] = field(default_factory=list)
    chat_ends: bool = True
    """Otherwise a chat's answer stays where its last piece is until the client goes."""
    chat_breaks_off: bool = False
    """The stream ends without a word."""
    finish_reason: str = "stop"
    ignored: str = ""
    log_events: list[dict[str, Any]] = field(default_factory=list)
    log_ends: bool = True
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """(method, path, body)."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """A client left a stream that was not at its end."""

    chat_began: threading.Event = field(default_factory=threading.Event)
    """A stream of a chat is open."""

    def bodies(self, path: str) -> list[Any]:
        return [body for _, asked, body in self.asked if asked == path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def address_string(self) -> str:
        return "somebody"  # a Unix socket's peer has no address

    def do_GET(self) -> None:
        self._handle(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self._handle(json.loads(self.rfile.read(length) or b"null"))

    def _handle(self, body: Any) -> None:
        path = self.path.partition("?")[0]
        self.script.asked.append((self.command, self.path, body))
        if self.script.key and path != "/health" and self.headers["authorization"] != f"Bearer {self.script.key}":
            self._refuse(Refusal(401, "Missing or wrong API key."))
            return
        exact: dict[str, Callable[[Any], None]] = {
            "/health": self._health,
            "/version": lambda _: self._answer({"lmserve": "9.8.7", "python": "3", "torch": None, "models": []}),
            "/api/v1/models": lambda _: self._answer(ManagedModels(self.script.models)),
            "/api/v1/models/load": self._load,
            "/api/v1/models/unload": self._unload,
            "/api/v1/models/download": self._download,
            "/v1/chat/completions": self._chat,
            "/log/stream": self._log,
        }
        if path in exact:
            exact[path](body)
        elif path == "/api/v1/models/download/status/job-1":
            self._download(body)
        elif path == "/api/v1/models/download/cancel/job-1":
            self._answer(download("cancelled", 1))
        else:
            self._refuse(Refusal(404, f"There is no {path}."))

    def _health(self, _: Any) -> None:
        if self.script.problem:
            self._answer({"status": "unavailable", "reason": self.script.problem}, 503)
        else:
            self._answer({"status": "ok"})

    def _load(self, body: Any) -> None:
        request = msgspec.convert(body, LoadRequest)
        if request.estimate_only:
            self._answer(estimate(request.model, fits=self.script.fits))
            return
        if self.script.load_refusals and not request.force:
            self._refuse(self.script.load_refusals.pop(0))
            return
        name = request.identifier or request.model
        done = LoadAnswer(
            type="llm", instance_id=name, load_time_seconds=9.1, status="loaded", memory_bytes=int(4.58 * GIB)
        )
        steps: list[Any] = [
            LoadEvent(type="model_load.progress", instance_id=name, progress=share, stage=stage)
            for share, stage in self.script.load_steps
        ]
        if self.script.load_ends:
            steps.append(LoadEvent(type="model_load.end", instance_id=name, progress=1.0, result=done))
            self.script.models = [
                msgspec.structs.replace(model, loaded_instances=[*model.loaded_instances, instance(name)])
                if model.key == request.model
                else model
                for model in self.script.models
            ]
        self._stream(steps, ends=self.script.load_ends)

    def _unload(self, body: Any) -> None:
        name = msgspec.convert(body, UnloadRequest).instance_id
        if name not in [one.id for model in self.script.models for one in model.loaded_instances]:
            self._refuse(Refusal(404, f"No model is loaded as {name!r}.", "model_not_found"))
            return
        self.script.models = [
            msgspec.structs.replace(model, loaded_instances=[one for one in model.loaded_instances if one.id != name])
            for model in self.script.models
        ]
        self._answer(UnloadAnswer(name, GIB))

    def _download(self, _: Any) -> None:
        jobs = self.script.downloads
        self._answer(jobs.pop(0) if len(jobs) > 1 else jobs[0])

    def _chat(self, _: Any) -> None:
        if self.script.chat_refusals:
            self._refuse(self.script.chat_refusals.pop(0))
            return
        chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}]
        for piece in self.script.pieces:
            if isinstance(piece, Refusal):
                chunks.append(json.loads(piece.body()))
            else:
                chunks.append({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        if self.script.chat_ends and not self.script.chat_breaks_off:
            usage = {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": self.script.finish_reason}]})
            chunks += [{"choices": [], "usage": usage}, "[DONE]"]
        self._stream(chunks, ends=self.script.chat_ends)

    def _log(self, _: Any) -> None:
        self._stream(self.script.log_events, ends=self.script.log_ends)

    def _refuse(self, refusal: Refusal) -> None:
        self._send(refusal.status, "application/json", refusal.body())

    def _answer(self, document: Any, status: int = 200) -> None:
        self._send(status, "application/json", msgspec.json.encode(document))

    def _send(self, status: int, media_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events: list[Any], *, ends: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        if self.script.ignored:
            self.send_header("x-lmserve-ignored", self.script.ignored)
        self.end_headers()
        try:
            self._chunk(b": listening\n\n")
            if self.path == "/v1/chat/completions":
                self.script.chat_began.set()
            for event in events:
                data = b"[DONE]" if event == "[DONE]" else msgspec.json.encode(event)
                self._chunk(b"data: " + data + b"\n\n")
            end = time.monotonic() + HELD_SECONDS
            while not ends and time.monotonic() < end:
                self._chunk(b": keep-alive\n\n")
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.script.abandoned.set()
            self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def scripted_server(script: Script, *, uds: str = "", tls: Any = None) -> Iterator[str]:
    """Runs it; yields its address. ``uds``: a Unix socket instead. ``tls``: an ``ssl.SSLContext`` of a server."""
    handler = type("Handler", (_Handler,), {"script": script})
    server: socketserver.BaseServer
    if uds:
        server, url = _UnixServer(uds, handler), f"unix:{uds}"
    else:
        port_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        url = f"{'https' if tls else 'http'}://127.0.0.1:{port_server.server_address[1]}"
        if tls:
            port_server.socket = tls.wrap_socket(port_server.socket, server_side=True)
        server = port_server
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
