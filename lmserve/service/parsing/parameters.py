"""JSON arguments made of parameters that come one by one, as text."""

from __future__ import annotations

from lmserve.service.parsing.turn import Turn
from lmserve.service.parsing.typed_values import json_text, parameter_types, typed_json
from lmserve.service.tools import Tool


class ParameterWriter:
    """The arguments of one call. It begins with this, for its tool is known and its parameters have begun."""

    def __init__(self, turn: Turn, tool: Tool) -> None:
        self._turn = turn
        self._tool = tool
        self._keys: set[str] = set()
        turn.begin_call(tool.name)

    def write(self, key: str, raw: str) -> None:
        """A parameter, typed by the tool's schema. Of two with one key the first counts."""
        if key in self._keys:
            return
        value = typed_json(raw, parameter_types(self._tool, key))
        self._turn.arguments(f"{', ' if self._keys else '{'}{json_text(key)}: {value}")
        self._keys.add(key)

    def close(self) -> None:
        """There are no more."""
        self._turn.arguments("}" if self._keys else "{}")
