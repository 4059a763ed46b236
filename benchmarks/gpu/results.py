"""What is measured: rows, and the sections that they stand in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Status = Literal["done", "failed", "stopped", "skipped"]


class Skipped(Exception):
    """A section that has nothing to measure on this device; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``value`` None: it was not measured, and ``note`` says why."""

    name: str
    value: float | None
    unit: str
    limit: float | None = None
    """What the device could do at best, in the same unit; None: there is no such limit, or it was not measured."""
    share: float | None = None
    """Of the roofline: what the device was seen to do at best is 1. For times it is the shortest over the measured."""
    note: str = ""
    failed: bool = False
    """It could have been measured here, and went wrong."""

    @classmethod
    def of_rate(cls, name: str, value: float, unit: str, limit: float | None, note: str = "") -> Row:
        """A figure of which more is better."""
        return cls(name, value, unit, limit, value / limit if limit else None, note)

    @classmethod
    def of_time(cls, name: str, value: float, unit: str, shortest: float | None, note: str = "") -> Row:
        """A figure of which less is better."""
        return cls(name, value, unit, shortest, shortest / value if shortest and value else None, note)


@dataclass(slots=True)
class Section:
    """One section's rows, of one model if it is about one."""

    name: str
    model: str = ""
    status: Status = "done"
    reason: str = ""
    """Why it is not done."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} {self.model}".strip()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Section:
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def line_of(row: Row) -> str:
    """As a section's process writes it: one line of JSON."""
    return json.dumps(asdict(row))


def rows_of(text: str) -> list[Row]:
    """What a section's process has written; a last line that it was stopped in does not count."""
    lines = text.split("\n")[:-1]
    return [Row(**json.loads(line)) for line in lines if line]


def attempt(what: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a part of a section. If it fails, a row that says so, and the section goes on.

    Raises:
        torch.AcceleratorError: the device itself has failed, and nothing after it would be true.
    """
    try:
        yield from measure()
    except torch.AcceleratorError:
        raise
    except Exception as error:
        yield Row(what, None, "", note=f"failed: {words_of(error)}", failed=True)


def words_of(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
