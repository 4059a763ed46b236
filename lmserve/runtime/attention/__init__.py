"""The attention backends by name. A backend is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.attention.base import AttentionBackend

BACKENDS: dict[str, str] = {
    "reference": "lmserve.runtime.attention.reference:ReferenceBackend",
    "sdpa": "lmserve.runtime.attention.sdpa:SdpaBackend",
    "cpu": "lmserve.runtime.attention.cpu:CpuBackend",
    "triton": "lmserve.runtime.attention.triton:TritonBackend",
    "fa3": "lmserve.runtime.attention.fa3:Fa3Backend",
}
BEST_FOR_DEVICE = {"cpu": "cpu", "cuda": "triton"}
NEEDS = {"triton": "triton", "fa3": "triton"}
"""Packages that come with torch for some devices only."""
LEAST_CAPABILITY = {"triton": (8, 0)}
"""Of a GPU (Ampere): Triton is for no older ones."""


def backend_class(name: str, device_type: str) -> type[AttentionBackend]:
    """The class behind a name; "auto" is the best one for the device that can be had.

    Raises:
        KeyError: no such backend.
        ModelLoadFailed: it needs a package that is not there.
    """
    has_capability = device_type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_capability else None
    chosen = best_for(device_type, capability) if name == "auto" else name
    if not _is_there(chosen):
        raise ModelLoadFailed(
            f"the attention backend {chosen} needs the package {NEEDS[chosen]}, which is not installed; sdpa needs none"
        )
    module, _, attribute = BACKENDS[chosen].partition(":")
    try:
        found: type[AttentionBackend] = getattr(import_module(module), attribute)
    except ImportError as error:  # a torch that lacks what it is made of
        raise ModelLoadFailed(f"the attention backend {chosen} cannot be had here: {error}") from error
    return found


def best_for(device_type: str, capability: tuple[int, int] | None = None) -> str:
    """The name of the best backend for a device, among those whose packages are there. ``capability``: of a GPU."""
    best = BEST_FOR_DEVICE.get(device_type, "sdpa")
    is_too_old = capability is not None and capability < LEAST_CAPABILITY.get(best, capability)
    return best if _is_there(best) and not is_too_old else "sdpa"


def _is_there(name: str) -> bool:
    return name not in NEEDS or find_spec(NEEDS[name]) is not None
