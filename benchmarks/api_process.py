"""What the API process costs for each streamed token, without the model.

    python -m benchmarks.api_process MODELFOLDER [--streams 64] [--tokens 400] [--logprobs] [--loop asyncio]
    python -m benchmarks.api_process MODELFOLDER --listeners [--rounds 3]

Three processes: a worker that has a token ready for every stream at every step (it speaks the real messages over a
real socket), the real API process pinned to one core, and a client on the other cores that reads every stream. In the
same run a bare application sends chunks of the same size to the same client from the same HTTP server: the ratio says
how much of the HTTP server's own speed is left. Only the folder's tokenizer is used.

``--listeners`` asks what the log stream costs the tokens instead: the same with nobody who listens, with listeners that
read, and with listeners that never read, round by round, so that the machine's moods hit each alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.api_stub import OneModel, run_worker, stub_info
from lmserve.api.app import create_app
from lmserve.config import Config, ModelConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.service.chat_images import ChatImages, image_limits
from lmserve.service.encoding import EncodingService
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.texts import Texts

AIM = 5000
"""Tokens a second that one core has to carry."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run."""

    tokens: int
    bytes: int
    seconds: float
    processor_seconds: float
    """Of the process that serves."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def microseconds_per_token(self) -> float:
        return 1e6 * self.processor_seconds / self.tokens


def run_api(folder: str, streams: int, loop: str, sock: socket.socket, listening: socket.socket) -> None:
    """The API process, with everything but the model manager."""
    pin({0})

    async def serve() -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        config = ModelConfig(model=folder, model_id="bench")
        engine = AsyncEngine(reader, writer, stub_info(streams), max_waiting=10**6, name="bench")
        models, log = OneModel(config, engine), LogStream()
        texts = Texts()
        service = GenerationService(models, texts, ChatImages(image_limits(Config())), log, Config())
        encoding = EncodingService(models, texts, log, Config())
        await texts.load(models.entries())
        reading = asyncio.create_task(engine.run())
        await _http(create_app(service, encoding, models, log, Config())).serve([listening])
        reading.cancel()

    (asyncio if loop == "asyncio" else uvloop).run(serve())


def run_bare(chunk_size: int, listening: socket.socket) -> None:
    """The HTTP server with chunks that cost nothing to make."""
    pin({0})
    chunk = b"data: " + b"x" * (chunk_size - 8) + b"\n\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await _answer(send, b"{}", more=False)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await _answer(send, b"")
        for _ in range(json.loads(body)["max_tokens"]):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0)  # a token comes alone, so its chunk is written alone
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    uvloop.run(_http(app).serve([listening]))


async def _answer(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _http(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", http="httptools"))


def pin(cores: set[int]) -> None:
    """The process runs on these cores only, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores & os.sched_getaffinity(0) or os.sched_getaffinity(0))


async def read_streams(port: int, streams: int, max_tokens: int, fields: dict[str, Any]) -> tuple[int, int]:
    """Chunks and bytes that came in all streams together."""

    async def one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        messages = [{"role": "user", "content": "Hi"}]
        body = json.dumps(
            {"messages": messages, "stream": True, "max_tokens": max_tokens, "seed": 1, **fields}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        chunks = size = 0
        while piece := await reader.read(1 << 16):
            chunks += piece.count(b"data: ")
            size += len(piece)
        writer.close()
        return chunks, size

    results = await asyncio.gather(*(one() for _ in range(streams)))
    return sum(chunks for chunks, _ in results), sum(size for _, size in results)


@contextlib.contextmanager
def listening_to_the_log(port: int, count: int, *, reading: bool) -> Iterator[None]:
    """So many listeners, each on a connection of its own; those that do not read leave it to fill up."""
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]

    def read(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(1 << 16):
                pass

    for connection in connections:
        connection.sendall(b"GET /log/stream?token_ids=1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 200")
        if reading:
            threading.Thread(target=read, args=(connection,), daemon=True).start()
    try:
        yield
    finally:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def measure(
    serve: Callable[..., None],
    arguments: tuple[Any, ...],
    streams: int,
    max_tokens: int,
    fields: dict[str, Any],
    listeners: int = 0,
    reading: bool = True,
) -> Figures:
    """Starts a server, warms it up, and reads all streams to their ends, while others listen to the log."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        port = listening.getsockname()[1]
        process = multiprocessing.Process(target=serve, args=(*arguments, listening), daemon=True)
        process.start()
        try:
            _wait(f"http://127.0.0.1:{port}/health")
            uvloop.run(read_streams(port, streams, 8, fields))
            server = psutil.Process(process.pid)
            before, began = sum(server.cpu_times()[:2]), time.perf_counter()
            with listening_to_the_log(port, listeners, reading=reading):
                chunks, size = uvloop.run(read_streams(port, streams, max_tokens, fields))
            seconds = time.perf_counter() - began
            assert chunks >= streams * max_tokens, f"{chunks} chunks came, {streams * max_tokens} were asked for"
            return Figures(streams * max_tokens, size, seconds, sum(server.cpu_times()[:2]) - before)
        finally:
            process.terminate()
            process.join()


def _wait(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(f"no answer from {url}")


def measure_api(options: argparse.Namespace, run: tuple[Any, ...], **listeners: Any) -> Figures:
    """The API process over a worker of its own."""
    ours, theirs = socket.socketpair()
    worker = multiprocessing.Process(target=run_worker, args=(theirs,), daemon=True)
    worker.start()
    try:
        return measure(run_api, (options.folder, options.streams, options.loop, ours), *run, **listeners)
    finally:
        worker.terminate()
        worker.join()
        ours.close()
        theirs.close()


LISTENERS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "nobody listens": {},
        "8 listeners that read": {"listeners": 8, "reading": True},
        "8 listeners that never read": {"listeners": 8, "reading": False},
    }
)


def compare_listeners(options: argparse.Namespace, run: tuple[Any, ...]) -> None:
    """Medians of the rounds, each as a ratio to nobody's."""
    speeds: dict[str, list[float]] = {name: [] for name in LISTENERS}
    for _ in range(options.rounds):
        for name, listeners in LISTENERS.items():
            speeds[name].append(measure_api(options, run, **listeners).tokens_per_second)
    print(f"{options.streams} streams of {options.tokens} tokens, medians of {options.rounds} rounds\n")
    print("| log stream | tokens/s | ratio |\n|---|---|---|")
    base = statistics.median(speeds["nobody listens"])
    for name, found in speeds.items():
        print(f"| {name} | {statistics.median(found):,.0f} | {statistics.median(found) / base:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model folder; only its tokenizer is read")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream")
    parser.add_argument("--logprobs", action="store_true", help="with the five likeliest tokens at each position")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="of the API process")
    parser.add_argument("--listeners", action="store_true", help="compare with listeners of the log stream")
    parser.add_argument("--rounds", type=int, default=3, help="of --listeners")
    options = parser.parse_args()
    fields = {"logprobs": True, "top_logprobs": 5} if options.logprobs else {}
    pin(set(range(1, os.cpu_count() or 2)))
    run = (options.streams, options.tokens, fields)
    if options.listeners:
        compare_listeners(options, run)
        return
    api = measure_api(options, run)
    bare = measure(run_bare, (api.bytes // api.tokens,), *run)
    print(f"{options.streams} streams of {options.tokens} tokens, {api.bytes // api.tokens} bytes a token\n")
    print("| | tokens/s | processor time, us/token | of the bare server's speed |")
    print("|---|---|---|---|")
    for name, figures in (("API process, one core", api), ("bare HTTP server, one core", bare)):
        share = figures.tokens_per_second / bare.tokens_per_second
        speed = f"{figures.tokens_per_second:,.0f}"
        print(f"| {name} | {speed} | {figures.microseconds_per_token:.1f} | {share:.2f} |")
    print(f"\n{api.tokens_per_second / AIM:.1f} times the aim of {AIM:,} tokens a second")


if __name__ == "__main__":
    main()
