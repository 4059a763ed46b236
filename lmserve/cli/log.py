"""``lmserve log stream``: what a running server's models receive and answer, in LM Studio's layout, and its devices."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Annotated, Any

import typer

from lmserve.cli.client import connect
from lmserve.cli.options import ApiKey, Url
from lmserve.cli.pipes import until_the_reader_leaves
from lmserve.cli.tables import format_size
from lmserve.cli.terminal import is_terminal, say, visible
from lmserve.errors import LMServeError

EPILOG = """Examples:

\b
  lmserve log stream
  lmserve log stream --filter input
  lmserve log stream --stats --json | jq .stats.tokensPerSecond
  lmserve log stream --source server
  lmserve log stream --source device --json"""
_DEVICE_USAGE = "device.usage"
_OF_MODELS = ("llm.prediction.", "embedding.")
_TEXTS = ("input", "output")
_IN_PLACE = ("timestamp", "type", "modelIdentifier", "modelPath", "choices", "stats", "inputs", *_TEXTS)
"""What the layout has a place for; whatever else an event says gets a line of its own."""

app = typer.Typer(help="Watch a running server.", rich_markup_mode=None)


class Source(str, Enum):
    """Who the events are of."""

    MODEL = "model"
    SERVER = "server"
    RUNTIME = "runtime"
    DEVICE = "device"


class WrongFilter(LMServeError):
    """A value of ``--filter`` that is none, or an option that the source does not have."""


@app.callback()
def log() -> None:
    """Watch a running server."""


@app.command("stream", epilog=EPILOG)
@until_the_reader_leaves
def stream(
    source: Annotated[
        Source,
        typer.Option(
            "--source", "-s", help="Texts of the models, what server or runtime say, or figures of the devices."
        ),
    ] = Source.MODEL,
    filter_: Annotated[
        str | None, typer.Option("--filter", metavar="input,output", help="Of the models: only one direction.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Of the models: the figures of each prediction.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Of the models: token ids beside the texts.")] = False,
    url: Url = "",
    api_key: ApiKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what each model receives and answers, as it happens."""
    params = {"types": ",".join(event_types(source, filter_))}
    for name, given in (("--stats", stats), ("--token-ids", token_ids)):
        if given and source is not Source.MODEL:
            raise WrongFilter(f"{name} can only be used with --source model")
    if token_ids:
        params["token_ids"] = "1"
    with (
        connect(url, api_key) as client,
        client.events("GET", "/log/stream", dict[str, Any], params=params) as events,
    ):
        say(f"Streaming logs from {client.address}")
        for event in events.data:
            if not stats:
                event.pop("stats", None)
            _print_event(event, as_json=as_json, stats=stats)
    if not as_json:
        say("The server closed the stream.")


def event_types(source: Source, filter_: str | None) -> tuple[str, ...]:
    """The types to ask the server for.

    Raises:
        WrongFilter: the filter has an unknown direction, or the source has none.
    """
    if source is not Source.MODEL:
        if filter_ is not None:
            raise WrongFilter("--filter can only be used with --source model")
        return (_DEVICE_USAGE,) if source is Source.DEVICE else (f"{source.value}.log",)
    if filter_ is None:
        return _types(_TEXTS)
    if not filter_.strip():
        raise WrongFilter("--filter cannot be empty")
    directions = tuple(part.strip() for part in filter_.split(","))
    if any(direction not in _TEXTS for direction in directions):
        raise WrongFilter("--filter values must be 'input', 'output', or 'input,output'")
    return _types(directions)


def _types(directions: Sequence[str]) -> tuple[str, ...]:
    """How far a long request for embeddings is belongs to what comes out."""
    progress = ("embedding.progress",) if "output" in directions else ()
    return tuple(kind + direction for kind in _OF_MODELS for direction in directions) + progress


def _print_event(event: Mapping[str, Any], *, as_json: bool, stats: bool) -> None:
    """On a terminal a model's text does not drive it; other programs get the text as it is."""
    text = json.dumps(event, ensure_ascii=False) if as_json else "\n".join(format_event(event, stats=stats))
    print(visible(text) if is_terminal(sys.stdout) else text, flush=True)


def format_event(event: Mapping[str, Any], *, stats: bool = False) -> Iterator[str]:
    """The lines of LM Studio's layout. ``stats``: with figures, or with the words that there are none."""
    kind = event["type"]
    if kind == "runtime.log":
        yield _runtime_line(event)
        return
    if kind == _DEVICE_USAGE:
        yield _usage_line(event)
        return
    if not kind.startswith(_OF_MODELS):
        yield str(event.get("content", event.get("message", "")))
        return
    time = datetime.fromtimestamp(event["timestamp"] / 1000).strftime("%Y-%m-%d %H:%M:%S")
    yield f"timestamp: {time}"
    yield f"type: {kind}"
    yield from (f"{name}: {event[name]}" for name in ("modelIdentifier", "modelPath") if name in event)
    yield from (f"{name}: {_one_line(value)}" for name, value in event.items() if name not in _IN_PLACE)
    yield from _text_lines(event)
    if stats and "output" in event:
        yield from _stats_lines(event)
    yield "\n"  # with print's own line feed: two empty lines


def _text_lines(event: Mapping[str, Any]) -> Iterator[str]:
    choices = event.get("choices") or ()
    if len(choices) > 1:
        for choice in choices:
            yield f"output {choice['index']}:\n{choice['output']}"
        return
    yield from (f"{name}:\n{event[name]}" for name in _TEXTS if name in event)
    inputs = event.get("inputs") or ()
    for index, text in enumerate(inputs):
        yield f"input {index}:\n{text}" if len(inputs) > 1 else f"input:\n{text}"


def _stats_lines(event: Mapping[str, Any]) -> Iterator[str]:
    figures = event.get("stats")
    if not figures:
        yield "No stats available"
        return
    choices = event.get("choices") or ()
    if len(choices) > 1:
        yield from (f"stopReason {choice['index']}: {choice['stopReason']}" for choice in choices)
        figures = {name: value for name, value in figures.items() if name != "stopReason"}
    yield from (f"{name}: {value}" for name, value in figures.items())


def _runtime_line(event: Mapping[str, Any]) -> str:
    """``[LEVEL] engine@version (type) model pid=n message``, without what the event does not know."""
    version = f"@{event['engineVersion']}" if event.get("engineVersion") else ""
    parts = [
        f"[{str(event.get('level', 'info')).upper()}]",
        f"{event.get('engineName', '')}{version}",
        f"({event['engineType']})" if event.get("engineType") else "",
        event.get("modelIdentifier") or "",
        f"pid={event['pid']}" if event.get("pid") else "",
        str(event.get("message", "")),
    ]
    return " ".join(part for part in parts if part)


def _usage_line(event: Mapping[str, Any]) -> str:
    """``09:22:34 cuda:0 97% busy, 70.2 GiB of 79.6 GiB used; tiny 36.1 GiB``, without what is not known."""
    time = datetime.fromtimestamp(event["timestamp"] / 1000).strftime("%H:%M:%S")
    used, total = event.get("memoryUsedBytes"), format_size(event["memoryTotalBytes"])
    memory = f"{total} of memory" if used is None else f"{format_size(used)} of {total} used"
    busy = _with_unit(event.get("utilizationPercent"), "% busy")
    models = (
        [each["modelIdentifier"], format_size(each["memoryBytes"]), *_with_unit(each.get("cpuPercent"), "% CPU")]
        for each in event["models"]
    )
    return "; ".join([f"{time} {event['device']} {', '.join([*busy, memory])}", *map(" ".join, models)])


def _with_unit(percent: float | None, unit: str) -> list[str]:
    return [] if percent is None else [f"{percent:.0f}{unit}"]


def _one_line(value: object) -> str:
    """``{"seed": 5, "top_p": null}`` becomes seed=5."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        said = ((name, part) for name, part in value.items() if part not in (None, [], {}))
        return " ".join(f"{name}={json.dumps(part, ensure_ascii=False)}" for name, part in said)
    return json.dumps(value, ensure_ascii=False)
