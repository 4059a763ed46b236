"""What commands print on standard output: tables, sizes, JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmserve.cli.terminal import is_terminal, visible

_NO_LIMIT = 100_000
"""Columns. A table is as wide as its cells: a narrow terminal wraps its lines, and no name is cut off."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Lines and colours on a terminal; plain columns, two spaces apart, for other programs. ``title`` may be empty."""
    cells = [[visible(cell).replace("\n", " ").replace("\t", " ") for cell in row] for row in rows]
    if not is_terminal(sys.stdout):
        _print_plain(title, [list(columns), *cells])
        return
    if title:
        print(title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in cells:
        table.add_row(*(Text(cell, style="green" if cell.startswith("✓") else "") for cell in row))
    Console(width=_NO_LIMIT, highlight=False).print(table)


def _print_plain(title: str, lines: Sequence[Sequence[str]]) -> None:
    if title:
        print(title)
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
    print()


def print_json(document: Any) -> None:
    """One line. ``document``: a struct, or what JSON knows."""
    text = msgspec.json.encode(document).decode()
    print(visible(text) if is_terminal(sys.stdout) else text)


def format_size(count: float) -> str:
    """Bytes for people: 512 B, 91.6 MiB, 4.58 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count /= 1024
        power += 1
    digits = 0 if power == 0 else 2 if count < 10 else 1
    return f"{count:.{digits}f} {units[power]}"


def format_seconds(seconds: float) -> str:
    """A span for people: 59s, 1m 30s, 2h 5m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60}s" if whole % 60 else f"{whole // 60}m"
    return f"{whole // 3600}h {whole % 3600 // 60}m" if whole % 3600 >= 60 else f"{whole // 3600}h"
