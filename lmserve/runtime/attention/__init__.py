"""The attention backends by name. A backend is a file and a line here."""

from __future__ import annotations

from importlib import import_module

from lmserve.runtime.attention.base import AttentionBackend

BACKENDS: dict[str, str] = {
    "reference": "lmserve.runtime.attention.reference:ReferenceBackend",
    "sdpa": "lmserve.runtime.attention.sdpa:SdpaBackend",
    "cpu": "lmserve.runtime.attention.cpu:CpuBackend",
}
BEST_FOR_DEVICE = {"cpu": "cpu"}


def backend_class(name: str, device_type: str) -> type[AttentionBackend]:
    """The class behind a name; "auto" is the best one for the device.

    Raises:
        KeyError: no such backend.
    """
    chosen = BEST_FOR_DEVICE.get(device_type, "sdpa") if name == "auto" else name
    module, _, attribute = BACKENDS[chosen].partition(":")
    found: type[AttentionBackend] = getattr(import_module(module), attribute)
    return found
