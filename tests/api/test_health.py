from __future__ import annotations

import platform
from importlib import metadata

import lmserve
from tests.api.running_server import RunningServer


def test_healthy(server: RunningServer) -> None:
    response = server.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_not_healthy(server: RunningServer) -> None:
    server.entry.state = "loading"
    response = server.get("/health")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "model org/stub is loading"}
    assert response.headers["retry-after"] == "1"


def test_versions(server: RunningServer) -> None:
    assert server.get("/version").json() == {
        "lmserve": lmserve.__version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "models": [{"id": "org/stub", "device": "cpu", "dtype": "float32"}],
    }
