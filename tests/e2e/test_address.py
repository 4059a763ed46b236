"""How a server is reached: TLS, a Unix socket, a key, another program's request id."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
import trustme

from tests.e2e.serving import start


def test_tls_with_a_key(tmp_path: Path, tiny_folder: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    arguments = (str(tiny_folder), "--threads", "1", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    with (
        start(tmp_path, *arguments, scheme="https", LMSERVE_API_KEY="secret") as server,
        openai.DefaultHttpxClient(verify=trust) as http,
    ):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", http_client=http, max_retries=0)
        answer = client.completions.create(model="any", prompt="a", max_tokens=3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 3
        with pytest.raises(openai.AuthenticationError) as caught:
            client.with_options(api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert http.get(f"{server.url}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # nobody else trusts this certificate


def test_a_unix_socket(tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "lmserve.sock"
    with start(tmp_path, str(tiny_folder), "--threads", "1", "--uds", str(path), uds=path) as server:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as http:
            body = {"prompt": "a", "max_tokens": 2}
            assert http.post("/v1/completions", json=body).json()["object"] == "text_completion"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # there is no port beside it
        curl = ["curl", "-sS", "--unix-socket", str(path), "http://localhost/v1/models"]
        assert b'"object":"list"' in subprocess.run(curl, capture_output=True, check=True).stdout
