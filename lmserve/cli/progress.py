"""How far a load or a download is: a bar on a terminal, else a line now and then. Both on standard error."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from lmserve.cli.tables import format_seconds, format_size
from lmserve.cli.terminal import is_terminal, say, visible


class Bar:
    """Shows one task until the block is left; a bar is then gone from the screen."""

    def __init__(self, label: str, *, counts_bytes: bool = False) -> None:
        console = Console(stderr=True)
        self._shows_bar = is_terminal(sys.stderr) and not console.is_dumb_terminal
        self._counts_bytes = counts_bytes
        self._label = label
        self._line = ""
        """The last one said, where there is no bar."""
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
        if counts_bytes:
            columns += [DownloadColumn(binary_units=True), _Rate()]
        else:
            columns += [TaskProgressColumn(), TextColumn("{task.fields[stage]}", markup=False)]
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(visible(label), total=None if counts_bytes else 1.0, stage="", speed=0.0)

    def __enter__(self) -> Bar:
        if self._shows_bar:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shows_bar:
            self._progress.stop()

    def show_stage(self, share: float, stage: str) -> None:
        """``share`` in [0, 1]. Without a bar there is a line for each stage."""
        self._progress.update(self._task, completed=share, stage=visible(stage))
        self._say(f"{self._label}: {stage}" if stage else self._label)

    def show_bytes(self, done: int, total: int, speed: float) -> None:
        """``total``: 0 until it is known; ``speed``: bytes a second. Without a bar there is a line for each tenth."""
        self._progress.update(self._task, completed=done, total=total or None, speed=speed)
        if total:
            self._say(f"{self._label}: {done * 10 // total * 10}% of {format_size(total)}")
        else:
            self._say(self._label)

    def _say(self, line: str) -> None:
        if not self._shows_bar and line != self._line:
            self._line = line
            say(line)


class _Rate(ProgressColumn):
    """Speed and time left by the server's figures: it knows better than the times at which we ask."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # in a narrow terminal the bar is what gets shorter

    def render(self, task: Task) -> Text:
        speed = task.fields["speed"]
        left = f", {format_seconds(task.remaining / speed)} left" if speed > 0 and task.remaining is not None else ""
        return Text(f"{format_size(speed)}/s{left}")
