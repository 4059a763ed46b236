"""What the server asks of a helper process, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Detail = Literal["auto", "low", "high"]


class BadImage(Exception):
    """It is none, or one that cannot be looked at; the message is a part of a sentence: why."""


class ProcessorError(Exception):
    """There is no processor for the model, or it has not what is needed; the message says why."""


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image for one model."""

    data: bytes
    detail: Detail
    max_pixels: int
    path: str
    """Of the model: a folder or a hub name."""
    trust_remote_code: bool
    revision: str
    folders: tuple[str, ...] = ()
    """Where the file of features may go, the first that has room."""


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """What became of it."""

    file: str
    num_bytes: int
    """Of the file."""
    content: str
    """Hash of the features."""
    format: str
    width: int
    height: int
    """As it is to be seen."""
    image_token: str
    """What the chat template writes for an image."""
    placeholder_id: int
    """The token whose embeddings the image's rows replace."""
    text: str
    """What stands for the image in the prompt."""
    num_placeholders: int
    """Of these tokens in ``text``."""
    detail_honoured: bool
    """Whether the model's processor can look less closely, where that was asked for."""
