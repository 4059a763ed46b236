"""``lmserve log stream``: what the models of a running server receive and answer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

import httpx
import typer

from lmserve.errors import LMServeError

DEFAULT_URL = "http://127.0.0.1:1234"
TYPE_PREFIX = "llm.prediction."

app = typer.Typer(help="Watch a running server.")


class WrongFilter(LMServeError):
    """A value of ``--filter`` that is none."""


class LogStreamFailed(LMServeError):
    """The server cannot be reached, or refuses."""


@app.callback()
def log() -> None:
    """Watch a running server."""


@app.command("stream")
def stream(
    url: Annotated[str, typer.Option(help="Address of the server.")] = DEFAULT_URL,
    api_key: Annotated[str, typer.Option(help="Key, if it asks for one [default: LMSERVE_API_KEY].")] = "",
    filter_: Annotated[str, typer.Option("--filter", metavar="input,output", help="Only one direction.")] = "",
    stats: Annotated[bool, typer.Option("--stats", help="With the figures of each prediction.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what each model receives and answers, as it happens."""
    wanted = parse_filter(filter_)
    key = api_key or os.environ.get("LMSERVE_API_KEY", "").split(",")[0]
    try:
        for event in _events(url, key, wanted):
            if not stats:
                event.pop("stats", None)
            print(json.dumps(event, ensure_ascii=False) if as_json else format_event(event), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse_filter(text: str) -> tuple[str, ...]:
    """The directions in ``--filter``; none for all.

    Raises:
        WrongFilter: one of them is unknown.
    """
    parts = tuple(part.strip() for part in text.split(",")) if text else ()
    if any(part not in ("input", "output") for part in parts):
        raise WrongFilter("--filter values must be 'input', 'output', or 'input,output'")
    return parts


def format_event(event: dict[str, Any]) -> str:
    """The event in LM Studio's layout, with an empty line after it."""
    time = datetime.fromtimestamp(event["timestamp"] / 1000).strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"timestamp: {time}", f"type: {event['type']}"]
    lines += [
        f"{name}: {event[name]}" for name in ("modelIdentifier", "modelPath", "level", "message") if name in event
    ]
    choices = event.get("choices") or []
    if len(choices) > 1:
        lines += [f'output {choice["index"]}: "{choice["output"]}"' for choice in choices]
    else:
        lines += [f'{direction}: "{event[direction]}"' for direction in ("input", "output") if direction in event]
    if "stats" in event:
        lines.append("stats:")
        lines += [f"  {name}: {value}" for name, value in event["stats"].items()]
    return "\n".join(lines) + "\n"


def _events(url: str, key: str, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The server's events until it closes the stream."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    params = {"types": ",".join(TYPE_PREFIX + direction for direction in wanted)} if wanted else {}
    timeout = httpx.Timeout(10.0, read=None)
    try:
        with httpx.stream(
            "GET", f"{url.rstrip('/')}/log/stream", headers=headers, params=params, timeout=timeout
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                raise LogStreamFailed(f"{url} answers {answer.status_code}: {_reason(answer)}")
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise LogStreamFailed(f"no answer from {url}: {error}") from error


def _reason(answer: httpx.Response) -> str:
    """The message of an OpenAI error object, or the body's beginning."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
