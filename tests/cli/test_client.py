from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from lmserve.api.schema.manage import LoadRequest, ManagedModels
from lmserve.cli.address import Address
from lmserve.cli.client import Disconnected, NoServer, ServerClient, ServerRefused, as_fields
from tests.cli.running import lmserve
from tests.cli.scripted_server import Refusal, Script, managed_model, scripted_server

MODELS = [managed_model("b"), managed_model("a")]


@contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """Somebody who answers one connection with these bytes, and hangs up. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(30)


def test_answers_are_structs_in_order() -> None:
    with scripted_server(Script(models=MODELS)) as url, ServerClient(Address(url)) as client:
        assert [model.key for model in client.models()] == ["a", "b"]


def test_only_what_was_set_is_sent() -> None:
    assert as_fields(LoadRequest(model="x", ttl=5.0, force=False)) == {"model": "x", "ttl": 5.0, "force": False}


def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "lm.sock")
    with scripted_server(Script(models=MODELS), uds=path) as url:
        by_url = lmserve("ls", "--json", "--url", url)
        by_variable = lmserve("status", LMSERVE_UDS=path, LMSERVE_PORT="1")
    gone = lmserve("ls", LMSERVE_UDS=path + "x")
    assert by_url.returncode == 0
    assert f"Server: ON (unix:{path})" in by_variable.stdout
    assert gone.stderr == f"lmserve: no answer from unix:{path}x; start one with: lmserve serve\n"


def test_tls(tmp_path: Path) -> None:
    """The certificate is not made out to 127.0.0.1, nor is its authority known: it is the server's own file."""
    issued = trustme.CA().issue_cert("example.com")
    file = tmp_path / "cert.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(context)
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("example.com").cert_chain_pems[0].write_to_path(str(other))
    with scripted_server(Script(), tls=context) as url:
        port = url.rpartition(":")[2]
        known = lmserve("status", LMSERVE_PORT=port, LMSERVE_SSL_CERTFILE=str(file))
        unknown = lmserve("status", "--url", url)
        wrong = lmserve("status", LMSERVE_PORT=port, LMSERVE_SSL_CERTFILE=str(other))
    assert (known.returncode, known.stderr) == (0, "")
    assert f"Server: ON (https://127.0.0.1:{port})" in known.stdout
    for refused in (unknown, wrong):
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"no trusted answer from https://127.0.0.1:{port}" in refused.stderr


def test_a_proxy_does_not_stand_between_us_and_this_machine() -> None:
    with scripted_server(Script(models=MODELS)) as url:
        done = lmserve("ls", "--json", "--url", url, HTTP_PROXY="http://127.0.0.1:1", http_proxy="http://127.0.0.1:1")
    assert (done.returncode, done.stderr) == (0, "")


def test_nobody_there() -> None:
    with pytest.raises(NoServer, match="no answer from http://127.0.0.1:1; start one with: lmserve serve"):
        ServerClient(Address("http://127.0.0.1:1")).models()


def test_an_answer_that_does_not_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with ServerClient(Address(url), seconds=0.05) as client, pytest.raises(Disconnected, match="in time"):
            client.models()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", "does not answer /api/v1/models as lmserve does"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", "the connection to http://127.0.0.1:[0-9]+ broke"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 6\r\n\r\n<html>", "answers 404 <html>"),
        (b'HTTP/1.1 400 No\r\ncontent-length: 16\r\n\r\n{"error":"nope"}', "^nope$"),
        (b'HTTP/1.1 500 No\r\ncontent-length: 14\r\n\r\n{"error":null}', "answers 500"),
        (b"SSH-2.0-OpenSSH\r\n", "broke"),
    ],
)
def test_somebody_else_there(answer: bytes, says: str) -> None:
    with (
        raw_server(answer) as url,
        ServerClient(Address(url)) as client,
        pytest.raises((ServerRefused, Disconnected), match=says),
    ):
        client.get("/api/v1/models", ManagedModels)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"data: {no json\n\n", "none of lmserve's"),
        (b"data: 5\n\n", "none of lmserve's"),
        (b'data: {"error": {"message": "lost", "code": "x"}}\n\n', "^lost$"),
    ],
)
def test_events_that_are_none(body: bytes, says: str) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    with (
        raw_server(head + body) as url,
        ServerClient(Address(url)) as client,
        client.events("GET", "/log/stream", dict[str, Any]) as events,
        pytest.raises(ServerRefused, match=says),
    ):
        next(events.data)


def test_events_end_where_they_should() -> None:
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    body = (
        ': comment\nid: 5\ndata: {"a": "\u2028\x85"}\r\n\ndata:{"b": 2}\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n'.encode()
    )
    with (
        raw_server(head + body) as url,
        ServerClient(Address(url)) as client,
        client.events("GET", "/log/stream", dict[str, Any]) as events,
    ):
        assert list(events.data) == [{"a": "\u2028\x85"}, {"b": 2}]


def test_a_refused_stream_has_the_servers_words_and_code() -> None:
    refusal = Refusal(400, "It does not fit.", "insufficient_memory")
    with (
        scripted_server(Script(load_refusals=[refusal])) as url,
        ServerClient(Address(url)) as client,
        pytest.raises(ServerRefused, match="^It does not fit.$") as caught,
        client.events("POST", "/api/v1/models/load", dict[str, Any], body={"model": "x"}),
    ):
        raise AssertionError("not reached")
    assert (caught.value.status, caught.value.code) == (400, "insufficient_memory")
