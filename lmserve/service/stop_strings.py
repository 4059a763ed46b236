"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopPatterns:
    """What is known of stop strings before any text: made once for a request, shared by its choices."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.strings = tuple(stop)
        self.prefixes = frozenset(s[:length] for s in stop for length in range(1, len(s)))
        self.longest = max(map(len, stop), default=0)


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may become one.

    The first stop string is the one that is complete first (of those complete at once, the longest), so the answer
    does not depend on how the text was cut into pieces. The stop string is no part of the text.
    """

    def __init__(self, patterns: StopPatterns) -> None:
        self._patterns = patterns
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """The text that is decided now. Once ``matched`` is set there is no more."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(index + len(s), index, s) for s in self._patterns.strings if (index := text.find(s)) >= 0]
        if found:
            _, index, self.matched = min(found)
            self._held = ""
            return text[:index]
        held = self._undecided(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text ends: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._patterns.longest - 1, len(text)), 0, -1):
            if text[-length:] in self._patterns.prefixes:
                return length
        return 0
