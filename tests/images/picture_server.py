"""A real server of pictures on this machine, and a fetcher that may reach it: names are what the tests say they are."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trustme

from lmserve.errors import InvalidRequest
from lmserve.images.address import IPAddress, is_public
from lmserve.images.fetch import ImageFetcher
from lmserve.images.source import ImageLimits

PATH = "messages[0].content[1].image_url.url"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
MAX_BYTES = 20_000
SECONDS = 20.0
LOOPBACK = "127.0.0.1"


def is_loopback_or_public(address: IPAddress) -> bool:
    return address == ipaddress.ip_address(LOOPBACK) or is_public(address)


def plain(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(headers or (f"Content-Length: {len(body)}",)), "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return plain(b"", status, f"Location: {location}", "Content-Length: 0")


@dataclass
class PictureServer:
    """Answers each path with the bytes given for it, then closes; keeps the requests' heads."""

    answers: dict[str, bytes]
    drips: bool = False
    """One byte of the answer at a time, a little too slowly."""
    port: int = 0
    heads: list[list[str]] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            self.heads.append(head)
            answer = self.answers.get(head[0].split(" ")[1], plain(b"", "404 Not Found"))
            for i in range(len(answer) if self.drips else 1):
                writer.write(answer[i : i + 1] if self.drips else answer)
                await writer.drain()
                if self.drips:
                    await asyncio.sleep(0.05)
        except (ConnectionError, asyncio.IncompleteReadError):  # the client has seen enough
            pass
        finally:
            writer.close()

    @property
    def num_connections(self) -> int:
        return len(self.heads)


class Names:
    """A resolver: each name's answers in turn, the last one again and again."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): list(each) for name, each in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self._answers:
            raise OSError("no such host")
        answers = self._answers[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def limits(*hosts: str, seconds: float = SECONDS) -> ImageLimits:
    return ImageLimits(max_bytes=MAX_BYTES, max_pixels=1, max_images=1, seconds=seconds, hosts=hosts)


@dataclass
class Outcome:
    data: bytes | None
    reason: str
    param: str | None = None


def fetched(
    url: str,
    server: PictureServer,
    names: Names | None = None,
    *,
    hosts: Sequence[str] | None = None,
    seconds: float = SECONDS,
    is_allowed_address: Callable[[IPAddress], bool] = is_loopback_or_public,
    tls: ssl.SSLContext | None = None,
    verify: ssl.SSLContext | bool = True,
    max_bytes: int | None = None,
) -> Outcome:
    """What comes of ``url``, in which PORT is the server's; hosts: all names at this port, unless given."""

    async def scenario() -> Outcome:
        serving = await asyncio.start_server(server.answer, LOOPBACK, 0, ssl=tls)
        server.port = serving.sockets[0].getsockname()[1]
        port = str(server.port)
        server.answers = {path: answer.replace(b"PORT", port.encode()) for path, answer in server.answers.items()}
        listed = [entry.replace("PORT", port) for entry in (["*:PORT"] if hosts is None else hosts)]
        fetcher = ImageFetcher(
            limits(*listed, seconds=seconds),
            resolver=names or Names(pictures_test=[[LOOPBACK]]),
            is_allowed_address=is_allowed_address,
            verify=verify,
        )
        try:
            return Outcome(await fetcher.fetch(url.replace("PORT", port), PATH, max_bytes), "")
        except InvalidRequest as error:
            return Outcome(None, f"{error}".replace(port, "PORT"), error.param)
        finally:
            await fetcher.close()
            serving.close()

    return asyncio.run(asyncio.wait_for(scenario(), 2 * SECONDS))


def ok_server() -> PictureServer:
    return PictureServer({"/cat.png": plain(PICTURE), "/cat.png?size=2": plain(PICTURE[:100])})


class Certified:
    """A server's certificate, and a client that trusts who signed it."""

    def __init__(self, *names: str) -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(self.server)
        self.shown: list[str | None] = []
        self.server.sni_callback = lambda _socket, name, _context: self.shown.append(name)
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)
