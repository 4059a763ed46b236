"""``lmserve bench``: measures a server that runs, or one that it starts; ``compare`` and ``show`` read result files."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lmserve.cli.address import find_address
from lmserve.cli.bench.load import LoadFailed, Target
from lmserve.cli.bench.plot import plot
from lmserve.cli.bench.process import Server, foreign_command, free_port, lmserve_command
from lmserve.cli.bench.report import COLUMNS, compare, comparison_rows, markdown, table
from lmserve.cli.bench.results import Results, machine_facts, merge, read_results, write_results
from lmserve.cli.bench.run import measure
from lmserve.cli.bench.scenarios import SCENARIOS, Scenario
from lmserve.cli.client import connect
from lmserve.cli.options import ApiKey, AsJson, Url
from lmserve.cli.tables import print_json, print_table
from lmserve.cli.terminal import say
from lmserve.errors import LMServeError

EPILOG = """Examples:

\b
  lmserve bench                                             # the server that runs
  lmserve bench --serve smollm2-135m-instruct --output ours.json
  lmserve bench --serve models/Qwen3-0.6B --options '--quantization int8' --scenario s1 --scenario s8
  lmserve bench --command 'llama-server -m model.gguf -np 32 --port {port}' --name llama.cpp --output theirs.json
  lmserve bench compare theirs.json ours.json
  lmserve bench show ours.json theirs.json --markdown --plot throughput.svg"""
QUICK_TOKENS = 16

app = typer.Typer(
    help="Measure a server under load: throughput, time to the first token, time between tokens.",
    epilog=EPILOG,
    invoke_without_command=True,
    rich_markup_mode=None,
)

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="Result files.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the throughput (.svg, .png, .pdf).")]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@app.callback()
def bench(
    context: typer.Context,
    url: Url = "",
    api_key: ApiKey = "",
    model: Annotated[str, typer.Option(help="The model to ask; else the first that the server lists.")] = "",
    serve: Annotated[str, typer.Option(metavar="MODEL", help="Start a server of ours for the run.")] = "",
    options: Annotated[str, typer.Option(help="More options for that server, in quotes.")] = "",
    command: Annotated[str, typer.Option(help="Start somebody else's server; {port} is the port.")] = "",
    name: Annotated[str, typer.Option(help="What the contender is called in the results.")] = "",
    scenario: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(SCENARIOS)}; may be repeated. Else all.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="How often each is measured.")] = 3,
    streams: Annotated[int | None, typer.Option(min=1, max=4096, help="Clients at once, in every scenario.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=16, help="Length of the prompts.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the answers.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, max=100_000, help="Requests of a round.")] = None,
    rate: Annotated[float, typer.Option(min=0, help="Requests/s at random times, an open loop.")] = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="One short round: does it run, roughly how fast.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there.")] = None,
    as_json: AsJson = False,
) -> int | None:
    """Measure a server under load."""
    if context.invoked_subcommand is not None:
        return None
    if sum(map(bool, (url, serve, command))) > 1:
        raise typer.BadParameter("--url, --serve and --command exclude each other")
    chosen = _scenarios(scenario or list(SCENARIOS), streams, prompt_tokens, new_tokens, requests, rate)
    if quick:
        chosen, rounds = [_quick(each) for each in chosen], 1
    if serve or command:
        port = free_port()
        started = foreign_command(command, port) if command else lmserve_command(serve, port, shlex.split(options))
        say(f"starting {started[0] if command else serve}")
        with Server(started, port, {**os.environ, "HF_HUB_OFFLINE": "1"}) as server:
            results = _measure(
                server.base_url, api_key, model, name or ("contender" if command else "lmserve"), chosen, rounds
            )
            results = msgspec.structs.replace(
                results, ready_seconds=server.ready_seconds, memory_bytes=server.memory_bytes()
            )
    else:
        address = find_address(url, os.environ)
        if address.socket:
            raise typer.BadParameter("the benchmark needs a server with a port, not a Unix socket")
        results = _measure(address.url, api_key, model, name or "server", chosen, rounds)
    if output is not None:
        write_results(results, output)
    _show([results], as_json=as_json)
    return 0


def _measure(base_url: str, api_key: str, model: str, name: str, scenarios: Sequence[Scenario], rounds: int) -> Results:
    if not model:
        with connect(base_url, api_key) as client:
            listed = client.get("/v1/models", _Models).data
        if not listed:
            raise LoadFailed(f"{base_url} lists no model")
        model = listed[0].id
    target = Target(base_url, model, api_key)
    measured = measure(target, scenarios, rounds, say)
    return Results(name, {**machine_facts(_own_command()), "model": model}, measured)


def _own_command() -> str:
    """As it can be typed again, without what is secret."""
    parts = ["lmserve", *sys.argv[1:]]
    for index, part in enumerate(parts):
        if part == "--api-key" and index + 1 < len(parts):
            parts[index + 1] = "…"
    return shlex.join(part if not part.startswith("--api-key=") else "--api-key=…" for part in parts)


def _scenarios(
    names: Sequence[str],
    streams: int | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    requests: int | None,
    rate: float,
) -> list[Scenario]:
    changes = {
        key: value
        for key, value in {
            "streams": streams,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "num_requests": requests,
            "rate": rate or None,
        }.items()
        if value is not None
    }
    for name in names:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"there is no scenario {name!r}, only {', '.join(SCENARIOS)}")
    return [replace(SCENARIOS[name], **changes) for name in names]  # type: ignore[arg-type]


def _quick(scenario: Scenario) -> Scenario:
    return replace(
        scenario,
        num_requests=min(scenario.num_requests, scenario.streams),
        new_tokens=min(scenario.new_tokens, 64 if scenario.long_tokens else QUICK_TOKENS),
        long_tokens=min(scenario.long_tokens, 1000),
    )


@app.command("compare")
def compare_files(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A result file.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another one.")],
    fail_below: Annotated[
        float, typer.Option(min=0, help="Exit code 1 if a figure is worse than so many times the first.")
    ] = 0.0,
    as_json: AsJson = False,
) -> int:
    """Compare two result files: ratios (over 1 is better) and whether they lie beyond the spread of the rounds."""
    found = compare(read_results(before), read_results(after))
    if not found:
        raise LMServeError("the files have no scenario in common")
    if as_json:
        print_json(found)
    else:
        print_table("", ("scenario", "figure", "before", "after", "ratio", "verdict"), comparison_rows(found))
    failed = [each for each in found if each.verdict == "worse" and each.ratio < fail_below]
    return 1 if failed else 0


@app.command("show")
def show_files(
    files: Files,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a document.")] = False,
    picture: Plot = None,
    as_json: AsJson = False,
) -> int:
    """Show result files side by side; the first is compared with the others. Runs of the same name count as one."""
    results = merge([read_results(path) for path in files])
    if picture is not None:
        plot(results, picture)
    if as_markdown:
        print(markdown(results))
    else:
        _show(results, as_json=as_json)
    return 0


def _show(results: Sequence[Results], *, as_json: bool) -> None:
    if as_json:
        print_json(results[0] if len(results) == 1 else list(results))
    else:
        print_table("", COLUMNS, table(results))
