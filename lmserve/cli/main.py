"""The ``lmserve`` command."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import typer

from lmserve.cli import chat, get, load, log, models, serve, status, version
from lmserve.cli.bench import command as bench
from lmserve.cli.pipes import until_the_reader_leaves
from lmserve.cli.terminal import say
from lmserve.errors import ConfigError, LMServeError, ModelLoadFailed

EXIT_FAILED = 1
EXIT_START_FAILED = 3


_SERVE_EXAMPLES = """Examples:

\b
  lmserve serve
  lmserve serve Qwen/Qwen2.5-0.5B-Instruct --max-model-len 8192
  lmserve serve small=/models/qwen2.5-0.5b --port 8080"""

app = typer.Typer(
    name="lmserve",
    help="An OpenAI-compatible server for Hugging Face transformers models.",
    epilog="""Examples:

\b
  lmserve serve
  lmserve chat
  lmserve chat --help""",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long option names off
)
app.command("serve", epilog=f"{_SERVE_EXAMPLES}\n\n{serve.EPILOG}")(serve.serve)
_CLIENTS: tuple[tuple[Callable[..., int | None], str], ...] = (
    (status.status, status.EPILOG),
    (models.ls, models.LS_EPILOG),
    (models.ps, models.PS_EPILOG),
    (get.get, get.EPILOG),
    (load.load, load.LOAD_EPILOG),
    (load.unload, load.UNLOAD_EPILOG),
    (chat.chat, chat.EPILOG),
    (version.version, version.EPILOG),
)
for _command, _epilog in _CLIENTS:
    app.command(_command.__name__, epilog=_epilog)(until_the_reader_leaves(_command))
app.add_typer(log.app, name="log")
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits: 0, 1 when it failed, 2 for wrong usage, 3 when a server cannot be started,
    130 (typer's) when it was interrupted.

    Every failure is one line on standard error. No arguments: the help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _tolerate_locales()
    try:
        code = app(arguments or ["--help"], prog_name="lmserve", standalone_mode=False)
    except typer.TyperException as error:
        code = _fail(error.format_message(), error.exit_code)
    except (ConfigError, ModelLoadFailed) as error:
        code = _fail(str(error), EXIT_START_FAILED)
    except LMServeError as error:
        code = _fail(str(error), EXIT_FAILED)
    sys.exit(code)


def _tolerate_locales() -> None:
    """A character that the locale does not have is no reason to die, nor are broken bytes that somebody types."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(text: str, code: int) -> int:
    say(f"lmserve: {' '.join(text.split())}")
    return code
