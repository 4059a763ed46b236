"""By what a model's configuration shows that it reads images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMAGE_PARTS = ("vision_config", "vq_config")
"""Parts that describe an image encoder; the second one's makes tokens of a picture (Chameleon, Emu 3)."""


def has_image_part(config: Mapping[str, Any]) -> bool:
    """Whether the content of a ``config.json`` has one."""
    return any(isinstance(config.get(part), dict) for part in IMAGE_PARTS)
