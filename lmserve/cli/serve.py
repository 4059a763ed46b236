"""``lmserve serve``: its options are the keys of the configuration."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lmserve.config import Key, format_bytes, keys
from lmserve.config_sources import resolve

EPILOG = (
    "Each option is also a variable (--max-num-seqs: LMSERVE_MAX_NUM_SEQS) and a key of the file given with --config "
    "(max_num_seqs). Options go before variables, variables before the file."
)


def _options_from_keys(command: Callable[..., int]) -> Callable[..., int]:
    """Gives ``command(MODEL…, **flags)`` one option for each key, as typer reads them from a signature."""
    parameters = [
        inspect.Parameter(
            "models",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=_help(keys()["model"]))],
        ),
        *(_parameter(key) for key in keys().values()),
    ]
    command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    return command


def _parameter(key: Key) -> inspect.Parameter:
    """All values are read as text: the configuration checks them, wherever they come from."""
    names = (key.flag, f"--no-{key.flag[2:]}") if key.kind is bool else (key.flag,)
    option = typer.Option(
        "/".join(names),
        help=_help(key),
        metavar=None if key.kind is bool else _metavar(key),
        show_default=False,
    )
    kind: Any = bool if key.kind is bool else list[str] if key.kind is tuple else str
    return inspect.Parameter(
        key.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _metavar(key: Key) -> str:
    if key.unit == "bytes":
        return "BYTES"
    if key.kind in (int, float):
        return "NUMBER"
    return "|".join(key.choices) or key.metavar or ("PATH" if key.path else "TEXT")


def _help(key: Key) -> str:
    default = key.default
    if key.unit == "bytes" and default:
        default = format_bytes(default)
    elif key.kind is tuple:
        default = ", ".join(default)
    elif key.kind is bool:
        default = "yes" if default else "no"
    return key.help if default is None or default == "" else f"{key.help} [default: {default}]"


@_options_from_keys
def serve(models: list[str] | None = None, **flags: Any) -> int:
    """Serve models to OpenAI clients."""
    flags["model"] = [*(models or ()), *(flags.get("model") or ())] or None
    config = resolve({name: None if value == [] else value for name, value in flags.items()}, os.environ)
    from lmserve.server import run  # noqa: PLC0415  (starlette and uvicorn: not for --help, nor for a bad configuration)

    return run(config)
