"""The real application on a real server over the real engine, whose loop runs in a thread around a fake runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from benchmarks.api_stub import OneModel
from lmserve.api.app import create_app
from lmserve.config import ModelConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.service.chat_images import ChatImages
from lmserve.service.encoding import EncodingService
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.texts import Texts
from tests.api.running_server import PATIENCE, wait_until
from tests.api.stub_engine import NO_LIMITS, Settings
from tests.engine.engine_thread import EngineThread
from tests.engine.fake_runner import FakeRunner
from tests.service import tokenizers_for_tests as made

SEND_BUFFER = 8192
"""Bytes that the kernel keeps for a client that does not read."""


class Client:
    """One request on a socket of its own, so that a test decides when it is read and when it ends."""

    def __init__(self, port: int, body: dict[str, object]) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n"
        self._socket.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)

    def read(self) -> list[str]:
        """The texts of all chunks of a stream, once it has ended with its mark."""
        answer = b""
        while piece := self._socket.recv(1 << 16):
            answer += piece
        self.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head, answer
        assert b"chunked" in head
        text, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            text += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        events = text.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]
        return [chunk["choices"][0]["text"] for chunk in chunks]

    def read_until(self, words: bytes, times: int) -> None:
        """Reads until the words have come so many times."""
        answer = b""
        while answer.count(words) < times:
            piece = self._socket.recv(1 << 16)
            assert piece, answer
            answer += piece

    def close(self) -> None:
        self._socket.close()


@dataclass
class EngineServer:
    """A server and its engine."""

    port: int
    thread: EngineThread
    engine: AsyncEngine

    def ask(self, prompt: list[int], max_tokens: int, *, stream: bool = True) -> Client:
        options = {"ignore_eos": True, "seed": 1, "stream": stream}
        return Client(self.port, {"prompt": prompt, "max_tokens": max_tokens, **options})


@contextlib.contextmanager
def engine_server(
    runner: FakeRunner, settings: Settings | None = None, *, max_waiting: int = 100
) -> Iterator[EngineServer]:
    """Starts both, and ends both: the engine's books are checked when it is idle and at its end."""
    made.smollm2()
    with EngineThread(runner) as thread, socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listening.bind(("127.0.0.1", 0))
        started: list[tuple[uvicorn.Server, AsyncEngine]] = []

        async def serve() -> None:
            thread.peer.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=thread.peer)
            engine = AsyncEngine(reader, writer, runner.info, max_waiting=max_waiting, name="fake")
            config, log = settings or Settings(), LogStream()
            models = OneModel(ModelConfig(model="/models/fake", model_id="fake"), engine)
            texts = Texts(lambda _: made.smollm2())
            service = GenerationService(models, texts, ChatImages(NO_LIMITS), log, config)
            encoding = EncodingService(models, texts, log, config)
            app = create_app(service, encoding, models, log, config)
            http = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", http="httptools"))
            started.append((http, engine))
            reading = asyncio.create_task(engine.run())
            await http.serve([listening])
            engine.shut_down()
            await reading
            texts.close()

        serving = threading.Thread(target=lambda: asyncio.run(serve()))
        serving.start()
        try:
            wait_until(lambda: started and started[0][0].started)
            http, engine = started[0]
            yield EngineServer(listening.getsockname()[1], thread, engine)
        finally:
            http.should_exit = True
            serving.join(PATIENCE)
        assert not serving.is_alive()
