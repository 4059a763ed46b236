"""What the process of a download tells the API process: one JSON object a line, on its standard output."""

from __future__ import annotations

from typing import Literal

import msgspec

FailureKind = Literal["not_found", "invalid", "forbidden", "unreachable", "no_space", "failed"]


class Plan(msgspec.Struct, frozen=True, tag="plan"):
    """It knows what there is to download, and begins; not sent where there is nothing. In bytes."""

    total: int
    downloaded: int
    """What the cache has already."""
    storage: str
    """The repository's folder in the cache."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    downloaded: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """Everything is in the cache, and is what the hub has."""

    path: str
    total: int
    already: bool
    """Nothing had to be downloaded."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It ends here. ``message`` is a sentence for the client; ``param`` is the field at fault, if it is one."""

    kind: FailureKind
    message: str
    param: str | None = None


Message = Plan | Progress | Done | Failed
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Message).decode
