"""What a command does when its reader (head, less) has seen enough: it ends well."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def until_the_reader_leaves(command: Callable[P, int | None]) -> Callable[P, int | None]:
    """The command with exit code 0 for a broken pipe. Its signature stays: typer reads options from it."""

    @functools.wraps(command)
    def guarded(*arguments: P.args, **options: P.kwargs) -> int | None:
        try:
            code = command(*arguments, **options)
            print(end="", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer goes there
            return 0
        return code

    return guarded
