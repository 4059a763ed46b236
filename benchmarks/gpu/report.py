"""A run's figures as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.aims import Verdict
from benchmarks.gpu.results import Row, Section


def environment_lines(environment: dict[str, Any]) -> list[str]:
    """On what it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    driver = f", driver {environment['driver']}" if "driver" in environment else ""
    return [f"{environment['device']}{driver}, {versions}", f"commit {environment['commit']}, {environment['date']}"]


def section_lines(section: Section) -> list[str]:
    """A heading and its rows."""
    state = "" if section.status == "done" else f"  {section.status}: {section.reason}"
    lines = [f"\n{section.title} ({section.seconds:.0f} s){state}"]
    return lines + [row_line(row) for row in section.rows]


def row_line(row: Row) -> str:
    """Name, figure, share of the roofline, and what there is to say."""
    value = "-" if row.value is None else figure(row.value)
    share = "" if row.share is None else f"{row.share:.0%}"
    limit = "" if row.limit is None else f"of {figure(row.limit)}"
    return f"  {row.name:<44} {value:>10} {row.unit:<15} {share:>5} {limit:<12} {row.note}".rstrip()


def aim_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The aims, each with what became of it."""
    lines = ["\naims"]
    for verdict in verdicts:
        value = "" if verdict.value is None else figure(verdict.value)
        lines.append(f"  {verdict.what:<52} {verdict.outcome:<12} {value:>10}  {verdict.reason}".rstrip())
    return lines


def figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}"
