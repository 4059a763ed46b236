"""Where people's own words hold a token that steers the model."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ControlTokens:
    """A tokenizer's control tokens, looked for in JSON values."""

    def __init__(self, names: Sequence[str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def are_in(self, value: object) -> bool:
        """Whether a text, or a key, holds one."""
        if isinstance(value, str):
            return self._any.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.are_in, value.keys())) or any(map(self.are_in, value.values()))
        return isinstance(value, list) and any(map(self.are_in, value))

    def find_key(self, value: object) -> str | None:
        """The first key that holds one."""
        if isinstance(value, dict):
            found = next((str(key) for key in value if self.are_in(key)), None)
            return found if found is not None else self.find_key(list(value.values()))
        if not isinstance(value, list):
            return None
        return next((key for key in map(self.find_key, value) if key is not None), None)
