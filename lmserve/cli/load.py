"""``lmserve load`` and ``lmserve unload``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from lmserve.api.schema.manage import (
    LoadAnswer,
    LoadEvent,
    LoadRequest,
    ManagedModel,
    MemoryEstimate,
    UnloadAnswer,
    UnloadRequest,
)
from lmserve.cli.client import Disconnected, ServerClient, ServerRefused, as_fields, connect
from lmserve.cli.models import NONE_LOADED
from lmserve.cli.options import ApiKey, AsJson, Url, complete_loaded, complete_model
from lmserve.cli.progress import Bar
from lmserve.cli.tables import format_size, print_json, print_table
from lmserve.cli.terminal import can_ask, choose, confirm, say
from lmserve.errors import LMServeError

LOAD_EPILOG = """Examples:

\b
  lmserve load qwen2.5-0.5b-instruct
  lmserve load qwen --ttl 1800 --context-length 8192
  lmserve load qwen --estimate-only
  lmserve load qwen --identifier small --yes"""
UNLOAD_EPILOG = """Examples:

\b
  lmserve unload qwen2.5-0.5b-instruct
  lmserve unload --all"""
EXIT_DOES_NOT_FIT = 1
EXIT_INTERRUPTED = 130
_LOAD_PATH = "/api/v1/models/load"
_MEMORY_IS_SHORT = "insufficient_memory"


class NoChoice(LMServeError):
    """It is not clear which model is meant, and there is nobody to ask."""


def load(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Its name or a part of it; asked for if it is not given.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = "",
    identifier: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name that clients use [default: the model's].")
    ] = None,
    ttl: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, help="Unload it after so much idleness [default: never]."),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", "-c", metavar="TOKENS", min=1, help="Of prompt and output together."),
    ] = None,
    parallel: Annotated[int | None, typer.Option(metavar="NUMBER", min=1, help="Sequences that run at once.")] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate-only", help="Load nothing: print the memory that it would take.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the first that fits the name, load it anyway.")
    ] = False,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> int:
    """Load a model into memory."""
    with connect(url, api_key) as client:
        request = LoadRequest(
            model=pick_model(client.models(), model, first=yes),
            identifier=identifier,
            ttl=ttl,
            context_length=context_length,
            parallel=parallel,
        )
        if estimate_only:
            return _estimate(client, request, as_json)
        answer = load_model(client, request, force=yes)
    if answer is None:
        return EXIT_INTERRUPTED
    if as_json:
        print_json(answer)
    return 0


def pick_model(models: Sequence[ManagedModel], text: str, *, first: bool) -> str:
    """The key of the model that is meant. ``first``: of several take the first, and ask nobody.

    What fits no key is left to the server: it knows aliases, too.

    Raises:
        NoChoice: there are several, and nobody to ask.
    """
    keys = [model.key for model in models]
    if text in keys:
        return text
    fitting = [key for key in keys if text.lower() in key.lower()]
    if text and len(fitting) <= 1:
        return fitting[0] if fitting else text
    if not keys:
        raise NoChoice("there are no models yet; get one with: lmserve get MODEL")
    if first and not text:
        raise NoChoice("--yes needs a MODEL")
    if first:
        return next((key for key in fitting if key.lower().startswith(text.lower())), fitting[0])
    return _choose("Which model?", fitting, f"{text!r} is a part of several names" if text else "no MODEL given")


def load_model(client: ServerClient, request: LoadRequest, *, force: bool = False) -> LoadAnswer | None:
    """Loads it, and says so. ``force``: also when memory is short, without a question. None: the user stopped it."""
    request = msgspec.structs.replace(request, stream=True)
    try:
        answer = _load_or_ask(client, request, force)
    except KeyboardInterrupt:
        say("Load cancelled.")
        return None
    size = f" ({format_size(answer.memory_bytes)})" if answer.memory_bytes else ""
    say(f"Model loaded in {answer.load_time_seconds:.1f} s{size}.")
    say(f"Use it as: model={answer.instance_id}")
    return answer


def _load_or_ask(client: ServerClient, request: LoadRequest, force: bool) -> LoadAnswer:
    try:
        return _follow_load(client, request)
    except ServerRefused as error:
        if error.code != _MEMORY_IS_SHORT or not (force or can_ask()):
            raise
        say(str(error))
        if not force and not confirm("Load anyway?"):
            raise KeyboardInterrupt from None
    return _follow_load(client, msgspec.structs.replace(request, force=True))


def _follow_load(client: ServerClient, request: LoadRequest) -> LoadAnswer:
    """Leaving early closes the connection, and the server gives the load up."""
    name = request.identifier or request.model
    with (
        Bar(f"Loading {name}") as bar,
        client.events("POST", _LOAD_PATH, LoadEvent, body=as_fields(request)) as events,
    ):
        for event in events.data:
            if event.result is not None:
                return event.result
            bar.show_stage(event.progress, event.stage)
    raise Disconnected(f"{client.address} ended the load of {name} without a word")


def _estimate(client: ServerClient, request: LoadRequest, as_json: bool) -> int:
    estimate = client.post(_LOAD_PATH, MemoryEstimate, msgspec.structs.replace(request, estimate_only=True))
    if as_json:
        print_json(estimate)
    else:
        tokens = f"{estimate.kv_cache_tokens} tokens"
        terms = (
            ("weights", estimate.weights_bytes),
            (f"KV cache ({tokens})", estimate.kv_cache_bytes),
            ("activations", estimate.activations_bytes),
            ("fixed", estimate.fixed_bytes),
            ("total", estimate.total_bytes),
            (f"free ({estimate.device})", estimate.free_bytes),
        )
        title = (
            f"{estimate.model}: {estimate.dtype}, context {estimate.context_length}, {estimate.parallel} in parallel\n"
        )
        print_table(title, ["MEMORY", "SIZE"], [[name, format_size(size)] for name, size in terms])
        if estimate.would_unload:
            print(f"It would unload: {', '.join(estimate.would_unload)}")
        print(estimate.message)
    return 0 if estimate.fits else EXIT_DOES_NOT_FIT


def unload(
    identifier: Annotated[
        str,
        typer.Argument(
            metavar="IDENTIFIER",
            help="Which; the loaded one, if it is the only one.",
            autocompletion=complete_loaded,
            show_default=False,
        ),
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Unload all of them.")] = False,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Unload a model, or all: their memory is free again."""
    if identifier and everything:
        raise typer.BadParameter("give an IDENTIFIER or --all, not both")
    with connect(url, api_key) as client:
        answers = [
            client.post("/api/v1/models/unload", UnloadAnswer, UnloadRequest(instance_id=name))
            for name in ([identifier] if identifier else _loaded(client, everything))
        ]
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        print(f"Unloaded {answer.instance_id} ({format_size(answer.freed_bytes)} free again).")
    if not answers:
        say("No models are currently loaded.")


def _loaded(client: ServerClient, everything: bool) -> list[str]:
    names = sorted(instance.id for model in client.models() for instance in model.loaded_instances)
    if everything or len(names) == 1:
        return names
    if not names:
        raise NoChoice(NONE_LOADED)
    return [_choose("Which model?", names, "several models are loaded")]


def _choose(question: str, names: Sequence[str], why: str) -> str:
    if can_ask():
        return choose(question, names)
    raise NoChoice(f"{why}: {', '.join(names)}")
