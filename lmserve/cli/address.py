"""Where the server is: ``--url``, else the variables that the server itself reads, else its defaults."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lmserve.config import keys
from lmserve.errors import LMServeError

_SOCKET_SCHEME = "unix:"
_EVERYWHERE: Mapping[str, str] = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses that one listens on and nobody can call, and what to call instead."""


class WrongAddress(LMServeError):
    """No server can be at such an address."""


@dataclass(frozen=True, slots=True)
class Address:
    """One server's address."""

    url: str
    """Without ``/v1`` and without a slash at its end."""
    socket: str = ""
    """Path of a Unix socket; then the url says nothing about where the server is."""
    certificate: str = ""
    """PEM file that the server's certificate is in."""
    is_ours: bool = False
    """Made of the server's own variables, not of a URL that somebody wrote."""

    def __str__(self) -> str:
        return _SOCKET_SCHEME + self.socket if self.socket else self.url

    @property
    def is_local(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def tls(self) -> ssl.SSLContext | bool:
        """What to check the server's certificate with. True: the authorities that httpx knows.

        Raises:
            WrongAddress: the certificate's file cannot be read.
        """
        if not self.certificate:
            return True
        pinned = self.is_ours and self.is_local
        # For the server of this machine that one file is all we trust. Its certificate is known by itself, and seldom
        # made out to 127.0.0.1.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if pinned else ssl.create_default_context()
        context.check_hostname = not pinned
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        try:
            context.load_verify_locations(Path(self.certificate).expanduser())
        except (OSError, ssl.SSLError) as error:
            raise WrongAddress(f"LMSERVE_SSL_CERTFILE: cannot use {self.certificate}: {error}") from error
        return context


def find_address(url: str, environ: Mapping[str, str]) -> Address:
    """The server's address. ``url``: what the user gave (``unix:PATH`` is a Unix socket), or nothing.

    Raises:
        WrongAddress: the url is none, or the variables name no port.
    """
    certificate = environ.get("LMSERVE_SSL_CERTFILE", "").strip()
    if url:
        return _from_url(url.strip(), certificate)
    scheme = "https" if certificate else "http"
    socket = environ.get("LMSERVE_UDS", "").strip()
    if socket:
        return Address(f"{scheme}://localhost", str(Path(socket).expanduser()), certificate, is_ours=True)
    host = environ.get("LMSERVE_HOST", "").strip() or keys()["host"].default
    port = environ.get("LMSERVE_PORT", "").strip() or str(keys()["port"].default)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise WrongAddress(f"LMSERVE_PORT is {port!r}: give the server's address with --url")
    host = _EVERYWHERE.get(host, host)
    return Address(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", certificate=certificate, is_ours=True)


def _from_url(url: str, certificate: str) -> Address:
    if url.startswith(_SOCKET_SCHEME):
        path = "/" + url.removeprefix(_SOCKET_SCHEME).lstrip("/") if url.startswith("unix:/") else url[5:]
        return Address("http://localhost", str(Path(path).expanduser()))
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a broken IPv6 address
        usable = False
    if not usable:
        raise WrongAddress(f"--url {url!r} is no address such as http://127.0.0.1:1234")
    return Address(full.rstrip("/").removesuffix("/v1").rstrip("/"), certificate=certificate)
