"""What the API process costs for each streamed token, without the model.

    python -m benchmarks.api_process MODELFOLDER [--streams 64] [--tokens 400] [--logprobs] [--loop asyncio]

Three processes: a worker that has a token ready for every stream at every step (it speaks the real messages over a
real socket), the real API process pinned to one core, and a client on the other cores that reads every stream. In the
same run a bare application sends chunks of the same size to the same client from the same HTTP server: the ratio says
how much of the HTTP server's own speed is left. Only the folder's tokenizer is used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream

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
        service = GenerationService(models, log, Config())
        await service.load_texts(models.entries())
        reading = asyncio.create_task(engine.run())
        await _http(create_app(service, models, log, Config())).serve([listening])
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


def measure(
    serve: Callable[..., None], arguments: tuple[Any, ...], streams: int, max_tokens: int, fields: dict[str, Any]
) -> Figures:
    """Starts a server, warms it up, and reads all streams to their ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        port = listening.getsockname()[1]
        process = multiprocessing.Process(target=serve, args=(*arguments, listening), daemon=True)
        process.start()
        try:
            _wait(f"http://127.0.0.1:{port}/health")
            uvloop.run(read_streams(port, streams, 8, fields))
            server = psutil.Process(process.pid)
            before, began = sum(server.cpu_times()[:2]), time.perf_counter()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model folder; only its tokenizer is read")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream")
    parser.add_argument("--logprobs", action="store_true", help="with the five likeliest tokens at each position")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="of the API process")
    options = parser.parse_args()
    fields = {"logprobs": True, "top_logprobs": 5} if options.logprobs else {}
    pin(set(range(1, os.cpu_count() or 2)))
    ours, theirs = socket.socketpair()
    worker = multiprocessing.Process(target=run_worker, args=(theirs,), daemon=True)
    worker.start()
    run = (options.streams, options.tokens, fields)
    api = measure(run_api, (options.folder, options.streams, options.loop, ours), *run)
    worker.terminate()
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
