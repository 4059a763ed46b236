"""``GET /health`` and ``GET /version``."""

from __future__ import annotations

import platform
from importlib import metadata

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lmserve import __version__
from lmserve.api.schema.models import Health, ModelVersion, Version
from lmserve.service.protocols import Models


class HealthEndpoint:
    """Says how the server is, and what it is."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def health(self, _: Request) -> Response:
        problem = self._models.problem()
        if problem is None:
            return Response(msgspec.json.encode(Health("ok")), media_type="application/json")
        body = msgspec.json.encode(Health("unavailable", problem))
        return Response(body, 503, {"retry-after": "1"}, media_type="application/json")

    async def version(self, _: Request) -> Response:
        version = Version(
            lmserve=__version__,
            python=platform.python_version(),
            torch=_installed("torch"),
            transformers=_installed("transformers"),
            models=[
                ModelVersion(entry.model_id, entry.info.device, entry.info.dtype)
                for entry in self._models.entries()
                if entry.info is not None
            ],
        )
        return Response(msgspec.json.encode(version), media_type="application/json")


def _installed(package: str) -> str | None:
    """Read from the package's metadata: importing it takes seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
