"""HTTP with a running server, as any client talks: answers as structs, failures as one sentence, event streams."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

import httpx
import msgspec

from lmserve.api.schema.manage import ManagedModel, ManagedModels
from lmserve.cli.address import Address, find_address
from lmserve.errors import LMServeError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 120.0
"""For answers that are no stream: an unload waits for the requests that run."""

T = TypeVar("T")


class NoServer(LMServeError):
    """Nobody listens at the address."""


class Disconnected(LMServeError):
    """Somebody listens, and the answer does not come, not to its end, or not from whom we trust."""


class ServerRefused(LMServeError):
    """The server's own words."""

    def __init__(self, message: str, *, status: int = 0, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        """0: the error came within a stream."""
        self.code = code


@dataclass(frozen=True, slots=True)
class Events(Generic[T]):
    """A stream of server-sent events that the server has agreed to."""

    headers: Mapping[str, str]
    data: Iterator[T]
    """Of each event, until ``[DONE]`` or the end of the stream."""


class ServerClient:
    """Owns the connections to one server. A context manager.

    Every method raises ``NoServer``, ``Disconnected`` or ``ServerRefused``. ``seconds``: how long one answer may take.
    """

    def __init__(self, address: Address, api_key: str = "", *, seconds: float = ANSWER_SECONDS) -> None:
        self.address = address
        self._http = httpx.Client(
            base_url=address.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            transport=httpx.HTTPTransport(uds=address.socket, verify=address.tls()) if address.socket else None,
            verify=address.tls(),
            # A proxy for the web at large does not lead to this machine.
            trust_env=not (address.is_local or address.socket),
        )

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, kind: type[T], *, accept: tuple[int, ...] = ()) -> T:
        """The answer. ``accept``: statuses other than 200 whose bodies are such answers, too."""
        return self._ask("GET", path, kind, None, accept)

    def post(self, path: str, kind: type[T], body: msgspec.Struct | None = None) -> T:
        """The answer. What ``body`` has at its default is left out."""
        return self._ask("POST", path, kind, as_fields(body) if body is not None else None, ())

    def models(self) -> list[ManagedModel]:
        """What the server knows, by key."""
        return sorted(self.get("/api/v1/models", ManagedModels).models, key=lambda model: model.key)

    @contextmanager
    def events(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Iterator[Events[T]]:
        """The stream's events. Leaving the block closes the connection, and the server stops what it did for it."""
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, read=None)
        with (
            self._explained(),
            self._http.stream(method, path, json=body, params=params, timeout=timeout) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                self._refuse(answer)
            yield Events(answer.headers, _data(answer.iter_bytes(), kind))

    def _ask(self, method: str, path: str, kind: type[T], body: Mapping[str, Any] | None, accept: tuple[int, ...]) -> T:
        with self._explained():
            answer = self._http.request(method, path, json=body)
        if answer.status_code != 200 and answer.status_code not in accept:
            self._refuse(answer)
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError as error:
            raise ServerRefused(f"{self.address} does not answer {path} as lmserve does: {error}") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """httpx's exceptions as ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if "CERTIFICATE" in str(error) or "SSL" in str(error):
                raise Disconnected(f"no trusted answer from {self.address}: {error}") from error
            raise NoServer(f"no answer from {self.address}; start one with: lmserve serve") from error
        except httpx.TimeoutException as error:
            raise Disconnected(f"no answer from {self.address} in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Disconnected(f"the connection to {self.address} broke: {error}") from error

    def _refuse(self, answer: httpx.Response) -> NoReturn:
        message, code = _read_error(answer.content)
        if not message:
            message = f"{self.address} answers {answer.status_code} {' '.join(answer.text.split())[:200]}".strip()
        if answer.status_code == 401:
            message += " Give one with --api-key or LMSERVE_API_KEY."
        raise ServerRefused(message, status=answer.status_code, code=code)


def connect(url: str, api_key: str, *, seconds: float = ANSWER_SECONDS) -> ServerClient:
    """The client of the server that options and variables name."""
    key = api_key or os.environ.get("LMSERVE_API_KEY", "").split(",")[0].strip()
    return ServerClient(find_address(url, os.environ), key, seconds=seconds)


def as_fields(body: msgspec.Struct) -> dict[str, Any]:
    """The fields of a request that were set."""
    fields = msgspec.structs.fields(body)
    return {field.name: value for field in fields if (value := getattr(body, field.name)) != field.default}


def _data(chunks: Iterator[bytes], kind: type[T]) -> Iterator[T]:
    """The data of each event until ``[DONE]`` or the end.

    Lines end at line feeds only: other line separators (U+2028, U+0085) stand unescaped within JSON.

    Raises:
        ServerRefused: the event is an error, or none that we know.
    """
    held = b""
    for chunk in chunks:
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            if text == b"[DONE]":
                return
            message, code = _read_error(text)
            if message:
                raise ServerRefused(message, code=code)
            try:
                yield msgspec.convert(json.loads(text), kind)
            except (ValueError, msgspec.MsgspecError) as error:
                raise ServerRefused(f"the server sent an event that is none of lmserve's: {error}") from error


def _read_error(body: bytes) -> tuple[str, str | None]:
    """Message and code of an OpenAI error object; no message where it is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "", None
    if isinstance(error, dict):
        return str(error.get("message") or error), error.get("code")
    return str(error or ""), None
