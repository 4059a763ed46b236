"""By what a model's configuration shows that it reads images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMAGE_PARTS = ("vision_config", "vq_config")
"""Parts that describe an image encoder; the second one's makes tokens of a picture (Chameleon, Emu 3)."""


def has_image_part(config: Mapping[str, Any]) -> bool:
    """Whether the content of a ``config.json`` has one."""
    return any(isinstance(config.get(part), dict) for part in IMAGE_PARTS)


def placeholder_id(config: Any) -> int | None:
    """The token that stands for a part of an image, by transformers' configuration, which has two names for it."""
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found
