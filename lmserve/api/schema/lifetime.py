"""How long a model that a request has loaded stays: the fields that every request to a model has."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from lmserve.api.schema.fields import honoured
from lmserve.api.schema.numbers import DURATION_PATTERN, keep_alive_seconds
from lmserve.errors import InvalidRequest


class ModelLifetime(msgspec.Struct, kw_only=True):
    """Part of a body."""

    ttl: Annotated[
        float | None,
        honoured(
            "seconds of idleness after which a model that requests load is unloaded; one that a person loaded stays",
            default="see --ttl-seconds",
            allowed="above 0",
        ),
    ] = None
    keep_alive: Annotated[
        str | float | None,
        honoured(
            "another name of ttl, as Ollama writes it",
            kind="number or string",
            allowed="seconds or 300ms, 5m, 1h30m; 0: unload at once; below 0: never",
            schema={"anyOf": [{"type": ["number", "null"]}, {"type": "string", "pattern": DURATION_PATTERN}]},
        ),
    ] = None

    def ttl_seconds(self) -> float | None:
        """The idle time that the model has afterwards; infinity for ever, None where nothing is asked for.

        Raises:
            InvalidRequest: it is out of range, or asked for in two ways.
        """
        if self.ttl is not None and not 0 < self.ttl < math.inf:
            raise InvalidRequest(f"ttl must be above 0, got {self.ttl}.", "ttl")
        kept = None if self.keep_alive is None else keep_alive_seconds(self.keep_alive)
        return same("ttl", self.ttl, "keep_alive", kept)


def same(name: str, value: float | None, alias: str, alias_value: float | None) -> float | None:
    """The value of a parameter with two names. Raises InvalidRequest if they were given different ones."""
    if value is not None and alias_value is not None and value != alias_value:
        raise InvalidRequest(f"{name} and {alias} are the same parameter and were given different values.", alias)
    return alias_value if value is None else value
