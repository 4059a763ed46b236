"""Pictures from the web, for strangers: what they name must not reach what only this machine can reach.

Each host name is resolved here, once; every address of it is judged, and the connection goes to an address that was.
A name that resolves to something else a moment later (DNS rebinding) changes nothing by it. Redirects begin anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import httpx

from lmserve.errors import InvalidRequest
from lmserve.images.address import IPAddress, is_public
from lmserve.images.source import ImageLimits

MAX_REDIRECTS = 3
MAX_ADDRESSES = 4
"""Of one host, that are tried."""
USER_AGENT = "lmserve"

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses, best first; OSError if there are none."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class _Refused(Exception):
    """Why there are no bytes, in words that name no address and no host but the client's own."""


async def resolve(host: str, port: int) -> list[str]:
    """What the system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class ImageFetcher:
    """Fetches over HTTP and HTTPS within ``limits``: no proxy, cookie or password, and nothing from the environment.

    ``is_allowed_address`` and ``verify`` (what certificates are checked by) are there for tests with servers of their
    own; so is ``resolver``.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        resolver: Resolver = resolve,
        is_allowed_address: Callable[[IPAddress], bool] = is_public,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._limits = limits
        self._resolver = resolver
        self._is_allowed_address = is_allowed_address
        self._verify = verify
        self._transport: httpx.AsyncHTTPTransport | None = None

    def _open(self) -> httpx.AsyncHTTPTransport:
        """Made late: reading the system's certificates takes its time, and most servers fetch nothing."""
        # A connection is found again by its address, which several names may share: one that was kept would skip the
        # check of the certificate for the next name. The bare transport follows nothing and remembers no cookies.
        if self._transport is None:
            self._transport = httpx.AsyncHTTPTransport(
                verify=self._verify, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
            )
        return self._transport

    async def fetch(self, url: str, path: str, max_bytes: int | None = None) -> bytes:
        """The body behind ``url``; ``max_bytes`` is what the request has left of its limit (the limit, if None).

        Raises:
            InvalidRequest: it may not be fetched, or cannot; ``path`` is the part's, for the error.
        """
        if not self._limits.hosts:
            raise InvalidRequest(f"{path}: this server fetches no images; send it as a data URI.", path)
        most = self._limits.max_bytes if max_bytes is None else min(max_bytes, self._limits.max_bytes)
        try:
            return await asyncio.wait_for(self._follow(url.strip(), most), self._limits.seconds)
        except _Refused as error:
            raise InvalidRequest(f"{path}: {error}.", path) from error
        except asyncio.TimeoutError as error:
            seconds = f"{self._limits.seconds:g} seconds"
            raise InvalidRequest(f"{path}: the image was not there within {seconds}.", path) from error

    async def close(self) -> None:
        """End what is being fetched; the fetcher is of no use afterwards."""
        if self._transport is not None:
            await self._transport.aclose()

    async def _follow(self, text: str, max_bytes: int) -> bytes:
        url = _parse(text)
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(url)
            try:
                if response.status_code not in _REDIRECTS:
                    return await _read(response, max_bytes)
                url = _redirected(url, response.headers.get("location", ""))
            except httpx.HTTPError as error:
                raise _Refused("its host broke off") from error
            finally:
                await response.aclose()
        raise _Refused(f"it is redirected more than {MAX_REDIRECTS} times")

    async def _get(self, url: httpx.URL) -> httpx.Response:
        """The head of the answer, from an address that may be reached."""
        host, port = self._permitted(url)
        addresses = await self._addresses(host, port)
        seconds = self._limits.seconds
        timeouts = {"connect": seconds / len(addresses), "read": seconds, "write": seconds, "pool": seconds}
        failure: httpx.HTTPError | None = None
        for address in addresses:
            request = httpx.Request(
                "GET",
                url.copy_with(host=str(address), port=port, fragment=None),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "User-Agent": USER_AGENT,
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                },
                extensions={"timeout": timeouts, "sni_hostname": host},
            )
            try:
                return await self._open().handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
            except httpx.HTTPError as error:
                raise _Refused("its host gave no proper answer") from error
        raise _Refused("its host cannot be reached") from failure

    def _permitted(self, url: httpx.URL) -> tuple[str, int]:
        """Host and port, if the list has them."""
        host = url.raw_host.decode("ascii").lower()
        port = _DEFAULT_PORTS[url.scheme] if url.port is None else url.port
        if not any(_is_listed(host, port, entry) for entry in self._limits.hosts):
            raise _Refused("its host or port is not among those that this server fetches images from")
        return host, port

    async def _addresses(self, host: str, port: int) -> list[IPAddress]:
        try:
            addresses = [ipaddress.ip_address(text) for text in await self._resolver(host, port)]
        except (OSError, ValueError) as error:  # also a name that cannot be one
            raise _Refused("its host is not known") from error
        if not addresses:
            raise _Refused("its host is not known")
        if not all(self._is_allowed_address(address) for address in addresses):
            raise _Refused("its host has an address that is not public")
        return list(dict.fromkeys(addresses))[:MAX_ADDRESSES]


def _parse(text: str) -> httpx.URL:
    try:
        return _checked(httpx.URL(text))
    except (httpx.InvalidURL, ValueError) as error:
        raise _Refused("it is no proper URL") from error


def _redirected(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return _checked(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise _Refused("it is redirected to what is no proper URL") from error


def _checked(url: httpx.URL) -> httpx.URL:
    if url.scheme not in _DEFAULT_PORTS:
        raise _Refused("images are fetched over http and https only")
    if url.userinfo:
        raise _Refused("a URL with a user or password in it is not fetched")
    host = url.raw_host.decode("ascii").lower()
    is_name = len(host) <= 253 and _HOST.fullmatch(host) is not None
    if not (is_name or _is_address(host)) or (url.port is not None and not 0 < url.port < 1 << 16):
        raise _Refused("it is no proper URL")
    return url


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return "%" not in host  # a zone, which is this machine's own matter


def _is_listed(host: str, port: int, entry: str) -> bool:
    name, colon, number = entry.lower().rpartition(":")
    if not colon or not number.isdecimal():
        name, number = entry.lower(), ""
    if port != int(number) if number else port not in _DEFAULT_PORTS.values():
        return False
    return name in ("*", host, f"[{host}]") or (name.startswith(".") and f".{host}".endswith(name))


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise _Refused(f"its host answered with status {response.status_code}")
    # Nothing else was asked for; a few bytes of it could become gigabytes.
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise _Refused("its host sends it compressed")
    too_large = f"it has more bytes than this request has left for images ({max_bytes})"
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _Refused(too_large)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise _Refused(too_large)
    if not body:
        raise _Refused("its host sent nothing")
    return bytes(body)
