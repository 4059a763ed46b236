"""The options that every command for a running server has, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from lmserve.cli.client import connect
from lmserve.errors import LMServeError

COMPLETION_SECONDS = 1.0

Url = Annotated[
    str,
    typer.Option(
        "--url",
        metavar="URL",
        show_default=False,
        help="Address of the server, or unix:PATH [default: what LMSERVE_UDS, LMSERVE_HOST and LMSERVE_PORT say, else "
        "http://127.0.0.1:1234].",
    ),
]
ApiKey = Annotated[
    str,
    typer.Option(
        "--api-key",
        metavar="KEY",
        show_default=False,
        help="Key, if the server asks for one [default: the first of LMSERVE_API_KEY].",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell: keys of the models that the server knows. Nothing when it does not answer at once."""
    return [name for name in _names(context, loaded=False) if name.startswith(incomplete)]


def complete_loaded(context: typer.Context, incomplete: str) -> list[str]:
    """For the shell: identifiers of the loaded models."""
    return [name for name in _names(context, loaded=True) if name.startswith(incomplete)]


def _names(context: typer.Context, *, loaded: bool) -> list[str]:
    given = context.params
    try:
        with connect(given.get("url") or "", given.get("api_key") or "", seconds=COMPLETION_SECONDS) as client:
            models = client.models()
    except LMServeError:  # there is nobody to tell: the shell would show it within the user's line
        return []
    if loaded:
        return sorted(instance.id for model in models for instance in model.loaded_instances)
    return [model.key for model in models]
