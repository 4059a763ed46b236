from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.api.running_server import RunningServer, running_server
from tests.api.stub_engine import Settings

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def locked_server() -> Iterator[RunningServer]:
    settings = Settings(api_key=("one", "t\u00fcr"), cors_origins=(ORIGIN,))
    with running_server(settings) as server:
        yield server


def test_a_sane_request_id_comes_back(server: RunningServer) -> None:
    assert server.get("/version", {"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "<script>"])
def test_others_are_replaced(server: RunningServer, given: str) -> None:
    first, second = (server.get("/version", {"x-request-id": given}).headers["x-request-id"] for _ in range(2))
    assert first.startswith("req_")
    assert first != second


def test_errors_have_one_too(server: RunningServer) -> None:
    assert server.get("/nothing", {"x-request-id": "a"}).headers["x-request-id"] == "a"


def test_any_key_will_do_where_none_is_asked_for(server: RunningServer) -> None:
    assert server.get("/v1/models", {"authorization": "Bearer whatever"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer one"},
        {"x-api-key": "one"},
        {"x-api-key": "one", "authorization": "Bearer wrong"},
    ],
)
def test_a_right_key(locked_server: RunningServer, headers: dict[str, str]) -> None:
    assert locked_server.get("/v1/models", headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer on"},
        {"authorization": "Bearer onee"},
        {"authorization": "one"},
        {"authorization": "Basic one"},
        {"x-api-key": ""},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/log/stream", "/nothing"])
def test_no_right_key(locked_server: RunningServer, path: str, headers: dict[str, str]) -> None:
    response = locked_server.get(path, headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


def test_the_official_client_knows_the_error(locked_server: RunningServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        locked_server.client.models.list()


def test_health_is_open(locked_server: RunningServer) -> None:
    assert locked_server.get("/health").status_code == 200


def test_a_key_beyond_ascii(locked_server: RunningServer) -> None:
    with locked_server.http as http:
        response = http.get("/v1/models", headers={b"x-api-key": "t\u00fcr".encode()})
    assert response.status_code == 200


def test_cors(locked_server: RunningServer) -> None:
    with locked_server.http as http:
        asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
        preflight = http.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200, "no key is asked for yet"
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        refused = http.get("/v1/models", headers={"origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == ORIGIN, "a page may read why"
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_no_cors_unless_configured(server: RunningServer) -> None:
    assert "access-control-allow-origin" not in server.get("/v1/models", {"origin": ORIGIN}).headers
