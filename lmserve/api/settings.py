"""What api needs of the configuration."""

from __future__ import annotations

from typing import Protocol


class ApiSettings(Protocol):
    """``lmserve.config.Config`` has these, among others."""

    @property
    def api_key(self) -> tuple[str, ...]:
        """Keys, one of which a client must show; none: anyone may come."""
        ...

    @property
    def cors_origins(self) -> tuple[str, ...]: ...

    @property
    def max_body_bytes(self) -> int: ...

    @property
    def body_seconds(self) -> float:
        """How long a request's body may take to come."""
        ...

    @property
    def max_json_nesting(self) -> int:
        """Levels of objects and arrays in a body."""
        ...

    @property
    def keep_alive_seconds(self) -> float:
        """How long a stream may be silent before it sends a comment."""
        ...
