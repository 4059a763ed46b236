"""The attention backends by name. A backend is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from lmserve.runtime.attention.base import AttentionBackend

BACKENDS: dict[str, str] = {
    "reference": "lmserve.runtime.attention.reference:ReferenceBackend",
    "sdpa": "lmserve.runtime.attention.sdpa:SdpaBackend",
    "cpu": "lmserve.runtime.attention.cpu:CpuBackend",
    "triton": "lmserve.runtime.attention.triton:TritonBackend",
}
BEST_FOR_DEVICE = {"cpu": "cpu", "cuda": "triton"}
NEEDS = {"triton": "triton"}
"""Packages that come with torch for some devices only."""


def backend_class(name: str, device_type: str) -> type[AttentionBackend]:
    """The class behind a name; "auto" is the best one for the device that can be had.

    Raises:
        KeyError: no such backend.
        ModuleNotFoundError: it needs a package that is not there.
    """
    chosen = best_for(device_type) if name == "auto" else name
    module, _, attribute = BACKENDS[chosen].partition(":")
    found: type[AttentionBackend] = getattr(import_module(module), attribute)
    return found


def best_for(device_type: str) -> str:
    """The name of the best backend for a device, among those whose packages are there."""
    best = BEST_FOR_DEVICE.get(device_type, "sdpa")
    return best if best not in NEEDS or find_spec(NEEDS[best]) is not None else "sdpa"
