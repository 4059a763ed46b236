"""The real application on a real server on a free port, over the stub engine, with SmolLM2's tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import httpx
import openai
import uvicorn
from starlette.applications import Starlette

from lmserve.api.app import create_app
from lmserve.api.downloads import DownloadsEndpoint
from lmserve.api.manage import ManageEndpoint
from lmserve.config import Config
from lmserve.models.downloads import Downloads, Job
from lmserve.models.manager import ModelManager
from lmserve.service.chat_images import ChatImages
from lmserve.service.encoding import EncodingService
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogStream
from lmserve.service.texts import Texts
from tests.api.stub_engine import NO_LIMITS, Script, Settings, StubEngine, StubEntry, StubModels, runner_info
from tests.service import tokenizers_for_tests as made

PATIENCE = 20.0
"""Seconds that anything may take before a test is wrong."""
OFFLINE = types.MappingProxyType({"HF_HUB_OFFLINE": "1"})


def says(*texts: str) -> Script:
    """A model that answers with these texts: choice i with the i-th, and the last from there on."""
    model = made.smollm2()
    end = model.tokenizer.eos_token_id
    return lambda request, choice: [*model.encode_rendered(texts[min(choice, len(texts) - 1)]), end]


def goes_on(request: object, choice: int) -> list[int]:
    """A model that has no end."""
    return made.smollm2().encode_rendered(" word") * 1000


@dataclass
class RunningServer:
    """A server and its parts."""

    url: str
    models: StubModels
    log: LogStream
    app: Starlette
    completed: list[Job]
    """Downloads that left a model in the cache."""

    @property
    def entry(self) -> StubEntry:
        return self.models.entry

    @property
    def engine(self) -> StubEngine:
        return self.entry.loaded_engine

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE)

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        with self.http as http:
            return http.get(path, headers=headers)

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
        with self.http as http:
            return http.post(path, json=body, headers=headers)

    def post_bytes(self, body: bytes, content_type: str = "application/json") -> httpx.Response:
        """To the chat endpoint, as it is."""
        with self.http as http:
            return http.post("/v1/chat/completions", content=body, headers={"content-type": content_type})

    def chat(self, **fields: object) -> httpx.Response:
        """A short chat, with these fields besides."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})

    def complete(self, **fields: object) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Once", **fields})

    def reset(self) -> None:
        """A fresh engine; the server goes on."""
        self.entry.loaded_engine = StubEngine(runner_info(), says("Hello there!"))
        self.entry.state, self.entry.facts = "loaded", None


@contextlib.contextmanager
def running_server(
    settings: Settings | None = None,
    environ: Mapping[str, str] = OFFLINE,
    aliases: tuple[tuple[str, str], ...] = (),
) -> Iterator[RunningServer]:
    """Starts it in a thread, and ends it.

    ``environ`` is what its downloads go by, ``aliases`` the models that /api/v1/models knows: real ones, if any.
    """
    entry, log = StubEntry(StubEngine(runner_info(), says("Hello there!"))), LogStream()
    models = StubModels(entry)
    config = settings or Settings()
    texts = Texts(lambda _: made.smollm2())
    service = GenerationService(models, texts, ChatImages(NO_LIMITS), log, config)
    encoding = EncodingService(models, texts, log, config)
    made.smollm2()
    completed: list[Job] = []
    downloads = Downloads(completed.append, environ)
    manager = ModelManager(Config(aliases=aliases))
    more = [*ManageEndpoint(manager, config).operations(), *DownloadsEndpoint(downloads, config).operations()]
    app = create_app(service, encoding, models, log, config, more)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", http="httptools"))

    async def serve(listening: socket.socket) -> None:
        await server.serve([listening])
        await downloads.close()
        await manager.stop()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield RunningServer(f"http://127.0.0.1:{port}", models, log, app, completed)
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            texts.close()
    assert not thread.is_alive()


def wait_until(condition: Callable[[], object]) -> None:
    """Other threads make it true; if they do not, the test fails."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)
