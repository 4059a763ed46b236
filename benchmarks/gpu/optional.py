"""Packages that the runtime imports and that nothing here uses."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NEEDED = ("torch", "transformers", "numpy", "msgspec", "psutil", "safetensors")


class _Missing:
    """Can be made, as a module does that is only imported, and does nothing."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        pass


def _refuse(*args: Any, **arguments: Any) -> None:
    raise ModuleNotFoundError("No module named 'llguidance'")


def stand_in_for_llguidance() -> None:
    """Where the package for grammars is not installed, names that can be imported stand for it: no request of a
    benchmark has a grammar. To be called before the runtime is imported."""
    if "llguidance" in sys.modules or find_spec("llguidance") is not None:
        return
    package, arrays = ModuleType("llguidance"), ModuleType("llguidance.numpy")
    for name in ("LLMatcher", "LLParserLimits", "LLTokenizer"):
        setattr(package, name, type(name, (_Missing,), {}))
    setattr(arrays, "fill_next_token_bitmask", _refuse)  # noqa: B010  # a module has no such attribute, says mypy
    sys.modules.update({"llguidance": package, "llguidance.numpy": arrays})


def missing() -> list[str]:
    """Packages that have to be there and are not."""
    return [name for name in NEEDED if find_spec(name) is None]
