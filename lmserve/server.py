"""The API process: the composition root of api, service and models, and its life from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import signal
import socket
import stat
import sys
from collections.abc import Coroutine, Generator, Sequence
from functools import partial
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette

from lmserve import __version__
from lmserve.api.app import create_app
from lmserve.api.downloads import DownloadsEndpoint
from lmserve.api.manage import ManageEndpoint
from lmserve.config import Config
from lmserve.errors import ConfigError, LMServeError, ModelLoadFailed
from lmserve.models.admission import size
from lmserve.models.downloads import Downloads
from lmserve.models.entry import ModelEntry
from lmserve.models.life import Observer
from lmserve.models.manager import ModelManager
from lmserve.models.usage import percent
from lmserve.service.chat_images import ChatImages, image_limits
from lmserve.service.encoding import EncodingService
from lmserve.service.generation import GenerationService
from lmserve.service.log_stream import LogEvent, LogStream, LogStreamHandler, device_event, runtime_event
from lmserve.service.texts import Texts

EXIT_OK = 0
EXIT_START_FAILED = 3
BACKLOG = 2048


def run(config: Config) -> int:
    """Serves until a signal ends it. Returns the exit code.

    Raises:
        ConfigError: the address cannot be bound, or a certificate cannot be read.
    """
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s: %(message)s", stream=sys.stderr)
    with _listen(config) as sock:
        return uvloop.run(_serve(config, sock))


async def _serve(config: Config, sock: socket.socket) -> int:
    """Listens at once (``/health`` says what is going on), loads, says so, and drains when told to."""
    log = LogStream()
    teller = _Teller(log)
    models = ModelManager(config, teller)
    texts = teller.texts = Texts()
    images = teller.images = ChatImages(image_limits(config))
    service = GenerationService(models, texts, images, log, config)
    encoding = EncodingService(models, texts, log, config)
    downloads = Downloads(lambda job: teller.downloaded(models))
    more = [*ManageEndpoint(models, config).operations(), *DownloadsEndpoint(downloads, config).operations()]
    app = create_app(service, encoding, models, log, config, more)
    http_server = _HttpServer(_uvicorn_config(config, app))
    try:
        http_server.config.load()
    except OSError as error:  # SSLError is one
        raise ConfigError(f"ssl_certfile: {config.ssl_certfile} and its key cannot be used: {error}") from error
    stopping = _stop_on_signals(http_server)
    logging.getLogger("lmserve").addHandler(handler := LogStreamHandler(log))
    models.start()
    http = asyncio.create_task(http_server.serve(sockets=[sock]))
    loaded = asyncio.create_task(_load(models, texts))
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({loaded, stop}, return_when=asyncio.FIRST_COMPLETED)
        if loaded.done():
            loaded.result()
            _announce(config, sock, models)
            await stop
        await _drain(models, config.drain_seconds, http_server)
        return EXIT_OK
    except ModelLoadFailed as error:
        print(f"lmserve: {error}", file=sys.stderr)
        return EXIT_START_FAILED
    finally:
        for task in (loaded, stop):
            task.cancel()
        await models.stop()  # before the HTTP server: requests that still run or wait get an answer that says so
        await downloads.close()
        log.close()  # an open listener would keep the server waiting
        http_server.stop()
        await asyncio.gather(http, loaded, stop, return_exceptions=True)
        texts.close()
        await images.close()
        logging.getLogger("lmserve").removeHandler(handler)


async def _load(models: ModelManager, texts: Texts) -> None:
    """The models that are loaded at the start: weights in the workers and tokenizers here, at the same time."""
    await models.wait_loaded()
    await texts.load([entry for entry in models.entries() if entry.state == "loaded"])


async def _drain(models: ModelManager, seconds: float, http_server: _HttpServer) -> None:
    """New requests are refused from here on; running ones have ``seconds`` to finish. A second signal ends the wait."""
    models.drain()
    idle = asyncio.create_task(models.wait_idle())
    forced = asyncio.create_task(http_server.forced.wait())
    await asyncio.wait({idle, forced}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in (idle, forced):
        task.cancel()


class _Teller(Observer):
    """Passes on what becomes of models: to the terminal, the log stream, and those who have their tokenizers."""

    def __init__(self, log: LogStream) -> None:
        self.texts: Texts | None = None
        self.images: ChatImages | None = None
        self._log = log
        self._stages: dict[ModelEntry, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def placed(self, entry: ModelEntry) -> None:
        """Tokenizer and processor are read while the worker reads weights; if that fails, who needs them hears why."""
        self._spawn(self._load_text(entry))

    def staged(self, entry: ModelEntry) -> None:
        if self._stages.get(entry) != entry.stage:
            self._stages[entry] = entry.stage
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(f"{entry.model_id}: {entry.stage}", file=sys.stderr, flush=True)
            self._publish(entry, 0 if entry.worker is None else entry.worker.process.pid, entry.stage)

    def said(self, entry: ModelEntry, pid: int, line: str) -> None:
        self._publish(entry, pid, line)

    def unloaded(self, entry: ModelEntry) -> None:
        self._stages.pop(entry, None)
        if self.texts is not None:
            self.texts.forget(entry)

    def looked(self, entries: Sequence[ModelEntry]) -> None:
        """One event for each device."""
        devices: dict[str, list[ModelEntry]] = {}
        for entry in entries:
            if entry.usage is not None and entry.usage.device is not None:
                devices.setdefault(entry.usage.device.name, []).append(entry)
        for those in devices.values():
            self._log.publish(partial(_usage_event, those))

    def downloaded(self, models: ModelManager) -> None:
        """A model has come: it is known from now on."""
        self._spawn(models.refresh(0.0))

    def _publish(self, entry: ModelEntry, pid: int, line: str) -> None:
        self._log.publish(lambda: runtime_event(entry.model_id, entry.config.device, pid, "info", line))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_text(self, entry: ModelEntry) -> None:
        if self.texts is not None:
            with contextlib.suppress(LMServeError):
                if await self.texts.reads_images(entry) and self.images is not None:
                    await self.images.prepare(entry)


def _usage_event(entries: Sequence[ModelEntry]) -> LogEvent:
    """Of one device, which all the entries run on."""
    usages = [(entry, entry.usage) for entry in entries if entry.usage is not None]
    device = usages[0][1].device
    assert device is not None
    facts = {
        "device": device.name,
        "memoryTotalBytes": device.total_bytes,
        "memoryUsedBytes": device.used_bytes,
        "utilizationPercent": percent(device.utilization),
    }
    models = [
        {"modelIdentifier": entry.model_id, "memoryBytes": usage.own_bytes, "cpuPercent": percent(usage.cpu)}
        for entry, usage in usages
    ]
    return device_event(facts, models)


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling (it would end the process before the workers) and fast poll."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.forced = asyncio.Event()
        self._stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # refreshes the Date header
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), timeout=1.0)

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()

    def force(self) -> None:
        """Running requests are not waited for any more."""
        self.force_exit = True
        self.forced.set()


def _stop_on_signals(http_server: _HttpServer) -> asyncio.Event:
    """SIGINT and SIGTERM: the first begins the drain, a second one ends it."""
    stopping = asyncio.Event()

    def handle() -> None:
        if stopping.is_set():
            http_server.force()
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    return stopping


def _uvicorn_config(config: Config, app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
        ssl_certfile=config.ssl_certfile or None,
        ssl_keyfile=config.ssl_keyfile or None,
    )


def _listen(config: Config) -> socket.socket:
    """The socket, bound before anything is loaded: a taken port is known at once."""
    if config.uds:
        return _listen_unix(config.uds)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from error
    return sock


def _listen_unix(path: str) -> socket.socket:
    """A socket file that nobody listens on any more is replaced; anything else at the path is left alone."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            if sock.connect_ex(path) == 0:
                raise ConfigError(f"cannot listen on {path}: a server is listening there")
            os.unlink(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return sock


def _announce(config: Config, sock: socket.socket, models: ModelManager) -> None:
    """What was loaded, what else is known, where it listens, and one line to try."""
    loaded = [entry for entry in models.entries() if entry.state == "loaded"]
    known = [entry for entry in models.entries() if entry.state == "not-loaded" and entry.known.problem is None]
    for entry in loaded:
        print(describe(entry), file=sys.stderr)
    if known and models.just_in_time:
        print(f"\nLoaded when asked for: {', '.join(entry.model_id for entry in known)}", file=sys.stderr)
    if config.uds:
        url, curl = f"http+unix://{config.uds}", f"curl --unix-socket {config.uds} http://localhost/v1/chat/completions"
    else:
        scheme = "https" if config.ssl_certfile else "http"
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"{scheme}://{host}:{sock.getsockname()[1]}/v1"
        curl = f"curl {url}/chat/completions"
    key = ' -H "Authorization: Bearer $LMSERVE_API_KEY"' if config.api_key else ""
    example = next((entry.model_id for entry in (*loaded, *known)), "NAME")
    # Bounded: a small model that finds no end would let the first thing that somebody tries take minutes on a CPU.
    chat = [{"role": "user", "content": "Say this is a test!"}]
    body = shlex.quote(json.dumps({"model": example, "messages": chat, "max_tokens": 64}))
    print(
        f"\nlmserve {__version__} listens on {url}\nTry:\n  {curl}{key} -H 'Content-Type: application/json' -d {body}",
        file=sys.stderr,
        flush=True,
    )


def describe(entry: ModelEntry) -> str:
    """A loaded model in a few lines for people."""
    info = entry.info
    assert info is not None
    model = (
        f"\n{entry.model_id}  {info.architecture} from {entry.path}, loaded in {info.load_seconds:.1f} s\n"
        f"  device   {info.device}, {info.dtype}, attention: {info.attention_backend}, {info.lane} lane\n"
        + (f"  lane     {info.lane_reason}\n" if info.lane_reason else "")
        + f"  weights  {info.num_parameters / 1e6:,.1f} M parameters, {size(info.weight_bytes)}\n"
    )
    if info.task != "generate":
        what = f"vectors of {info.row_size} numbers" if info.task == "embed" else f"{info.row_size} label(s)"
        return f"{model}  encoder  {what}; {info.max_model_len:,} tokens, {info.max_num_batched_tokens} a step"
    if info.images != "none":
        model += "  images   read\n"
    elif info.no_images:
        model += f"  images   refused: {info.no_images}\n"
    return model + (
        f"  KV cache {info.kv_cache_tokens:,} tokens, {size(info.kv_cache_bytes)}, blocks of {info.block_size}\n"
        f"  context  {info.max_model_len:,} tokens; {info.max_num_seqs} sequences at once, "
        f"{info.max_num_batched_tokens} tokens a step"
    )
