"""The document says what the server does: schemathesis makes requests from it and checks the answers against it."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from lmserve.api.openapi import body_schema
from lmserve.api.schema.chat import ChatCompletionRequest
from tests.api.running_server import RunningServer, goes_on, running_server
from tests.api.stub_engine import Settings

load_all_checks()
KEPT = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
WITHOUT_BODY = ["/v1/models", "/v1/models/{model_id}", "/api/v0/models", "/api/v0/models/{model_id}"]
MANAGED = ["/api/v1/models", "/api/v1/models/load", "/api/v1/models/unload"]
DOWNLOAD = "/api/v1/models/download"
OF_A_DOWNLOAD = [f"{DOWNLOAD}/status/{{job_id}}", f"{DOWNLOAD}/cancel/{{job_id}}"]
WITHOUT_BODY += ["/health", "/version", "/api/v1/models", *OF_A_DOWNLOAD]
NEVER_ANSWERED = ["/v1/models/{model_id}", "/api/v0/models/{model_id}", DOWNLOAD, *OF_A_DOWNLOAD]
NEVER_ANSWERED += MANAGED[1:]
EXAMPLES = {"/tokenize": 240, "/apply-template": 240}
"""Where 60 may miss every valid request: fields of tools go together in few ways, and to tokenize there is one text."""
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/api/v0/chat/completions",
    "/api/v0/completions",
    "/v1/embeddings",
    "/api/v0/embeddings",
    "/v1/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/v1/models",
    "/v1/models/{model_id}",
    "/api/v0/models",
    "/api/v0/models/{model_id}",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/health",
    "/version",
    DOWNLOAD,
    *OF_A_DOWNLOAD,
    *MANAGED,
]


def document(server: RunningServer) -> dict[str, Any]:
    response = server.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    result: dict[str, Any] = response.json()
    return result


def test_what_is_routed_is_documented(server: RunningServer) -> None:
    routes = server.app.routes
    routed = {(r.path.replace(":path}", "}"), m) for r in routes if isinstance(r, Route) for m in r.methods or ()}
    documented = {(path, method.upper()) for path, item in document(server)["paths"].items() for method in item}
    assert {(path, method) for path, method in routed if method != "HEAD"} == documented | {("/openapi.json", "GET")}
    assert {path for path, _ in documented} == {*PATHS, "/log/stream"}


def test_ranges_defaults_and_refusals_are_told() -> None:
    fields = body_schema(ChatCompletionRequest)["properties"]
    assert (fields["temperature"]["minimum"], fields["temperature"]["maximum"]) == (0, 2)
    assert fields["top_p"]["exclusiveMinimum"] == 0
    assert fields["top_k"]["type"] == ["integer", "null"]
    assert fields["echo"]["enum"] == [None, False]
    assert fields["tools"]["items"]["required"] == ["type", "function"]
    assert "x-lmserve-ignored" in fields["user"]["description"]
    assert body_schema(ChatCompletionRequest)["required"] == ["messages"]


def test_keys_are_documented_where_they_are_asked_for(server: RunningServer) -> None:
    assert "security" not in document(server)
    with running_server(Settings(api_key=("secret",))) as guarded:
        refused = guarded.get("/openapi.json")
        assert refused.status_code == 401
        allowed = guarded.get("/openapi.json", {"authorization": "Bearer secret"})
        assert allowed.json()["security"] == [{"bearer": []}, {"header": []}]
        assert allowed.json()["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize("path", PATHS)
def test_valid_requests(server: RunningServer, path: str) -> None:
    """No 5xx, what comes back is what the document says, and some are answered where that does not take luck."""
    statuses = try_requests(server, path, schemathesis.GenerationMode.POSITIVE)
    assert 200 in statuses or path in NEVER_ANSWERED


@pytest.mark.parametrize("path", [path for path in PATHS if path not in WITHOUT_BODY])
def test_broken_requests(server: RunningServer, path: str) -> None:
    """Each is refused as the document says: no 5xx."""
    assert max(try_requests(server, path, schemathesis.GenerationMode.NEGATIVE)) < 500


def try_requests(server: RunningServer, path: str, mode: schemathesis.GenerationMode) -> set[int]:
    """The statuses of answers to requests made from the document, after checking each answer."""
    schema = schemathesis.openapi.from_dict(document(server))
    (method,) = document(server)["paths"][path]
    checks: list[Any] = [check for check in CHECKS.get_all() if check.__name__ in KEPT]
    assert len(checks) == len(KEPT)
    statuses = set()
    server.engine.script = goes_on

    @given(schema[path][method.upper()].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES.get(path, 60),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case[Any]) -> None:
        response = case.call_and_validate(base_url=server.url, checks=checks, timeout=20)
        statuses.add(response.status_code)

    check()
    return statuses
