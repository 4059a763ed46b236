"""Reads an output that comes in pieces, from front to back: parsers are written as if all of it lay there.

A parser is a generator. Wherever a reader's method has to see more it yields; the driver resumes it when there is more,
or when the text has ended. Whatever a method has looked at and decided it takes, so nothing is looked at twice but an
end that may become a marker, which is as short as the longest marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable

from lmserve.service.parsing.events import CONTROL_BEGIN, CONTROL_END

Sink = Callable[[int, str], None]
"""Takes text and where it begins in the input."""
Steps = Generator[None, None, None]

MAX_CONTROL = 256
"""Characters of the longest name of a control token."""
MAX_WORD = 256
"""Characters of the longest name that is read."""
CONTROL = re.compile(f"{CONTROL_BEGIN}[^{CONTROL_BEGIN}{CONTROL_END}]{{0,{MAX_CONTROL}}}{CONTROL_END}")
SPACE = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r"[\w.\-]*")
_IN_STRING = re.compile(f'[^"\\\\{CONTROL_BEGIN}]*')
_OUTSIDE_STRING = re.compile(f'[^"{{}}\\[\\]{CONTROL_BEGIN}]*')
_SCALAR = re.compile(r"[\w.+\-]*")
_CLOSING = {"{": "}", "[": "]"}


class Malformed(Exception):
    """What has been read is not what it began as."""


class Stops:
    """Markers that end a text; made once, for the search costs more to prepare than to do."""

    def __init__(self, markers: Iterable[str]) -> None:
        self.markers = frozenset(markers)
        longest_first = sorted(self.markers, key=lambda marker: (-len(marker), marker))
        self.pattern = re.compile("|".join([*map(re.escape, longest_first), CONTROL.pattern]))
        self._prefixes = frozenset(marker[:length] for marker in self.markers for length in range(1, len(marker)))
        self._longest = max(map(len, self.markers), default=0)

    def undecided(self, text: str, start: int) -> int:
        """Where the end of the text begins that may become a marker, or another control token: its length, if none."""
        oldest = max(start, len(text) - MAX_CONTROL)
        control = text.rfind(CONTROL_BEGIN, oldest)
        limit = control if control >= 0 and CONTROL_END not in text[control:] else len(text)
        for index in range(max(start, len(text) - self._longest + 1), limit):
            if text[index:] in self._prefixes:
                return index
        return limit


class Reader:
    """The input, up to where it has come, and how far it has been read."""

    def __init__(self) -> None:
        self._buffer = ""
        self._at = 0
        self._base = 0
        self._ended = False
        self._held: list[tuple[int, str]] | None = None

    @property
    def position(self) -> int:
        """Characters of the input that have been read."""
        return self._base + self._at

    def push(self, text: str) -> None:
        """More of the input."""
        self._base += self._at
        self._buffer = self._buffer[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """There is no more."""
        self._ended = True

    def hold(self) -> None:
        """From here on what is read is kept, in case that it was not what it looked like."""
        self._held = []

    def drop_hold(self) -> None:
        """What is held is settled."""
        self._held = None

    def take_held(self) -> list[tuple[int, str]]:
        """What has been read since ``hold``, piece by piece; it is held no more."""
        held, self._held = self._held, None
        return held or []

    def text_until(self, stops: Stops, sink: Sink) -> Generator[None, None, str | None]:
        """Pass text on up to the first of the markers, and stand before it. None: the text has ended.

        Control tokens that are none of the markers are left out.
        """
        while True:
            match = stops.pattern.search(self._buffer, self._at)
            decided = len(self._buffer) if self._ended else stops.undecided(self._buffer, self._at)
            if match is not None and match.start() < decided:
                self._pass(match.start(), sink)
                if match.group() in stops.markers:
                    return match.group()
                self._take(match.end())
                continue
            self._pass(decided, sink)
            if self._ended:
                return None
            yield

    def collect_until(self, stops: Stops) -> Generator[None, None, str]:
        """Read text up to the first of the markers, and stand before it. Raises Malformed where none comes."""
        parts: list[str] = []
        if (yield from self.text_until(stops, lambda _, text: parts.append(text))) is None:
            raise Malformed
        return "".join(parts)

    def peek(self) -> Generator[None, None, str]:
        """The next character. Empty: the text has ended."""
        while self._at == len(self._buffer) and not self._ended:
            yield
        return self._buffer[self._at : self._at + 1]

    def accept(self, *options: str, cut_off: bool = False) -> Generator[None, None, str | None]:
        """Read the longest of these texts that comes next. None: none of them does, and nothing is read.

        With ``cut_off`` the end of the output may cut it off.
        """
        longest = max(map(len, options))
        while True:
            ahead = self._buffer[self._at : self._at + longest]
            longer = any(len(option) > len(ahead) and option.startswith(ahead) for option in options)
            if self._ended or not longer:
                break
            yield
        whole = [option for option in options if ahead.startswith(option)]
        if not whole and not (longer and cut_off):
            return None
        found = max(whole, key=len) if whole else ahead
        self._take(self._at + len(found))
        return found

    def expect(self, *options: str) -> Generator[None, None, str]:
        """Read one of these texts. Raises Malformed where none comes."""
        found = yield from self.accept(*options)
        if found is None:
            raise Malformed
        return found

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Steps:
        """Pass on the characters that the pattern, one class of characters with a ``*``, goes on over."""
        while True:
            match = pattern.match(self._buffer, self._at)
            self._pass(match.end() if match else self._at, sink)
            if self._at < len(self._buffer) or self._ended:
                return
            yield

    def space(self) -> Generator[None, None, str]:
        """Read blanks and line ends, if any come."""
        parts: list[str] = []
        yield from self.run(SPACE, lambda _, text: parts.append(text))
        return "".join(parts)

    def word(self) -> Generator[None, None, str]:
        """Read a name. Raises Malformed where none comes, or one too long."""
        parts: list[str] = []
        length = 0

        def add(_: int, text: str) -> None:
            nonlocal length
            length += len(text)
            if length > MAX_WORD:
                raise Malformed
            parts.append(text)

        yield from self.run(WORD, add)
        if not parts:
            raise Malformed
        return "".join(parts)

    def json_string(self) -> Generator[None, None, str]:
        """Read a JSON string: what it says. Raises Malformed."""
        parts: list[str] = []
        if (yield from self.peek()) != '"':
            raise Malformed
        yield from self.quoted('"', _IN_STRING, lambda _, text: parts.append(text))
        try:
            return str(json.loads("".join(parts), strict=False))
        except ValueError:
            raise Malformed from None

    def json_value(self, sink: Sink) -> Steps:
        """Pass on a JSON value, as it is written. Strings and brackets are followed, nothing else is checked.

        Raises Malformed where none comes, at a bracket that closes another, and where the text ends within it.
        """
        following = yield from self.peek()
        if following == '"':
            yield from self.quoted('"', _IN_STRING, sink)
        elif following in _CLOSING:
            self._pass(self._at + 1, sink)
            yield from self.json_rest(_CLOSING[following], sink)
        else:
            before = self.position
            yield from self.run(_SCALAR, sink)
            if self.position == before:
                raise Malformed

    def json_rest(self, closing: str, sink: Sink) -> Steps:
        """Pass on the rest of an object or array whose opening bracket has been read, up to this closing one."""
        open_ = [closing]
        while open_:
            yield from self.run(_OUTSIDE_STRING, sink)
            following = yield from self.peek()
            if following == '"':
                yield from self.quoted('"', _IN_STRING, sink)
                continue
            if following in _CLOSING:
                open_.append(_CLOSING[following])
            elif following != open_.pop():
                raise Malformed
            self._pass(self._at + 1, sink)

    def quoted(self, quote: str, inside: re.Pattern[str], sink: Sink) -> Steps:
        """Pass on a string with its quotes. ``inside``: what it holds but quotes, backslashes and control tokens.

        Raises Malformed where it does not end.
        """
        yield from self.one(sink)
        while True:
            yield from self.run(inside, sink)
            following = yield from self.peek()
            if following not in ("\\", quote):
                raise Malformed
            yield from self.one(sink)
            if following == quote:
                return
            if (yield from self.peek()) == CONTROL_BEGIN:
                raise Malformed
            yield from self.one(sink)

    def one(self, sink: Sink) -> Steps:
        """Pass on one character. Raises Malformed where the text has ended."""
        if not (yield from self.peek()):
            raise Malformed
        self._pass(self._at + 1, sink)

    def _pass(self, to: int, sink: Sink) -> None:
        if to > self._at:
            start, text = self.position, self._buffer[self._at : to]
            self._take(to)
            sink(start, text)

    def _take(self, to: int) -> None:
        if self._held is not None and to > self._at:
            self._held.append((self.position, self._buffer[self._at : to]))
        self._at = to
