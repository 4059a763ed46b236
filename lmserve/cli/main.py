"""The ``lmserve`` command."""

from __future__ import annotations

import sys

import typer

from lmserve.cli import log, serve, version
from lmserve.errors import ConfigError, LMServeError, ModelLoadFailed

EXIT_FAILED = 1
EXIT_START_FAILED = 3

app = typer.Typer(
    name="lmserve",
    help="An OpenAI-compatible server for Hugging Face transformers models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long option names off
)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("version")(version.version)
app.add_typer(log.app, name="log")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits: 0, 1 when it failed, 2 for wrong usage, 3 when a server cannot be started,
    130 (typer's) when it was interrupted.

    Every failure is one line on standard error. No arguments: the help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], prog_name="lmserve", standalone_mode=False)
    except typer.TyperException as error:
        code = _fail(error.format_message(), error.exit_code)
    except (ConfigError, ModelLoadFailed) as error:
        code = _fail(str(error), EXIT_START_FAILED)
    except LMServeError as error:
        code = _fail(str(error), EXIT_FAILED)
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    print(f"lmserve: {' '.join(text.split())}", file=sys.stderr)
    return code
