from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from lmserve.cli.address import Address, WrongAddress, find_address


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234"),
        ("http://127.0.0.1:1234/", "http://127.0.0.1:1234"),
        ("http://127.0.0.1:1234/v1", "http://127.0.0.1:1234"),
        ("https://example.com/behind/v1/", "https://example.com/behind"),
        ("localhost:80", "http://localhost:80"),
        ("[::1]:80", "http://[::1]:80"),
    ],
)
def test_a_url_that_somebody_wrote(given: str, url: str) -> None:
    found = find_address(given, {"LMSERVE_PORT": "1", "LMSERVE_UDS": "/run/x"})
    assert (found.url, found.socket, str(found)) == (url, "", url)


@pytest.mark.parametrize(
    "given", ["ftp://x", "http://", "http://x:port", "http://x:99999", "http://[::1", "http://x:0"]
)
def test_a_url_that_is_none(given: str) -> None:
    with pytest.raises(WrongAddress, match="is no address such as"):
        find_address(given, {})


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "http://127.0.0.1:1234"),
        ({"LMSERVE_PORT": "8080", "LMSERVE_HOST": "10.0.0.1"}, "http://10.0.0.1:8080"),
        ({"LMSERVE_HOST": "0.0.0.0"}, "http://127.0.0.1:1234"),
        ({"LMSERVE_HOST": "::", "LMSERVE_PORT": " "}, "http://[::1]:1234"),
        ({"LMSERVE_SSL_CERTFILE": "/c.pem"}, "https://127.0.0.1:1234"),
        ({"LMSERVE_UDS": "/run/lm.sock", "LMSERVE_PORT": "8080"}, "unix:/run/lm.sock"),
    ],
)
def test_the_servers_own_variables(variables: dict[str, str], address: str) -> None:
    assert str(find_address("", variables)) == address


@pytest.mark.parametrize("port", ["0", "x", "-1", "65536", "1e3"])
def test_variables_that_name_no_port(port: str) -> None:
    with pytest.raises(WrongAddress, match="give the server's address with --url"):
        find_address("", {"LMSERVE_PORT": port})


@pytest.mark.parametrize(("given", "path"), [("unix:/a/b", "/a/b"), ("unix:///a/b", "/a/b"), ("unix:a/b", "a/b")])
def test_a_unix_socket(given: str, path: str) -> None:
    assert find_address(given, {}).socket == path


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert find_address("", {"LMSERVE_UDS": "~/lm.sock"}).socket == "/home/somebody/lm.sock"


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://10.0.0.1:1", False),
        ("http://example.com", False),
    ],
)
def test_what_is_on_this_machine(url: str, local: bool) -> None:
    assert Address(url).is_local is local


def test_whom_to_trust(tmp_path: Path) -> None:
    """The host name is not looked at only where the server is ours, on this machine, and known by its certificate."""
    import trustme  # noqa: PLC0415

    file = tmp_path / "cert.pem"
    trustme.CA().issue_cert("example.com").private_key_and_cert_chain_pem.write_to_path(str(file))
    ours = find_address("", {"LMSERVE_SSL_CERTFILE": str(file)}).tls()
    away = find_address("", {"LMSERVE_SSL_CERTFILE": str(file), "LMSERVE_HOST": "10.0.0.1"}).tls()
    written = find_address("https://127.0.0.1:1234", {"LMSERVE_SSL_CERTFILE": str(file)}).tls()
    assert all(isinstance(context, ssl.SSLContext) for context in (ours, away, written))
    assert isinstance(ours, ssl.SSLContext)
    assert isinstance(away, ssl.SSLContext)
    assert isinstance(written, ssl.SSLContext)
    assert (ours.check_hostname, away.check_hostname, written.check_hostname) == (False, True, True)
    assert ours.verify_mode is away.verify_mode is ssl.CERT_REQUIRED
    assert find_address("https://example.com", {}).tls() is True
    with pytest.raises(WrongAddress, match="LMSERVE_SSL_CERTFILE: cannot use"):
        find_address("", {"LMSERVE_SSL_CERTFILE": str(tmp_path / "none.pem")}).tls()
