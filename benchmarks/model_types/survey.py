"""Every model type, one line and one record each: built or not, and whether it agrees with itself.

    python -m benchmarks.model_types [--kind causal] [--types llama mamba] [--workers 1] [--json FILE]

Each type runs in a process of its own, within limits of time and memory, since nobody knows what a type does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from benchmarks.model_types.baseline import check, layer_kinds
from benchmarks.model_types.embedded import embed
from benchmarks.model_types.page import render
from benchmarks.model_types.patches import WHY
from benchmarks.model_types.pictured import picture
from benchmarks.model_types.served import serve
from benchmarks.model_types.tiny import KINDS, CannotBuild, Kind, build, model_types

TABLE = Path(__file__).with_name("survey.json")
SECONDS = 60.0
MEMORY = 4 * 2**30
"""Bytes that a type may take beyond what the survey itself has."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a type. The numbers are ``baseline.Outcome``'s."""

    kind: Kind
    model_type: str
    architecture: str
    outcome: str
    """right, wrong, fails (it was built, and did not run) or not built."""
    reason: str = ""
    layers: str = ""
    parameters: int = 0
    error: float | None = None
    future: float | None = None
    reach: float | None = None
    seconds: float = 0.0
    served: str = ""
    """As ``served.Served``."""
    lane: str = ""
    served_reason: str = ""
    images: str = ""
    """As ``pictured.Pictured``; empty for types that read none."""
    images_reason: str = ""


@dataclass(slots=True)
class _Running:
    record: Record
    process: ForkProcess
    inbox: Connection
    started: float


def examine(kind: Kind, model_type: str) -> Record:
    """Build the type's tiny model and check it; in this process, without limits."""
    record = Record(kind, model_type, model_types(kind)[model_type], "not built")
    try:
        model = build(kind, model_type)
    except CannotBuild as error:
        return replace(record, reason=str(error))
    except Exception as error:
        return replace(record, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    record = replace(
        record,
        architecture=type(model).__name__,
        layers=layer_kinds(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    try:
        outcome = check(kind, model)
    except Exception as error:
        return replace(record, outcome="fails", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    why = WHY.get((kind, model_type)) if outcome.outcome != "right" else None
    numbers = {key: float(f"{value:.1e}") for key, value in asdict(outcome).items() if isinstance(value, float)}
    record = replace(record, **{**asdict(outcome), **numbers})
    if why:
        record = replace(record, reason=f"{why}: {outcome.reason}")
    if kind == "encoder":
        return replace(record, **asdict(embed(build(kind, model_type))))
    if record.outcome in ("right", "wrong"):
        record = replace(record, **asdict(serve(build(kind, model_type))))
    if kind == "image-text" and record.served == "exact" and record.lane in ("packed", "state"):
        record = replace(record, **asdict(picture(model_type, build(kind, model_type))))
    return record


def survey(wanted: Sequence[tuple[Kind, str]], workers: int = 1) -> Iterator[Record]:
    """A record for each type as it ends, at most so many at a time."""
    waiting, running = list(wanted), list[_Running]()
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(_start(*waiting.pop(0)))
        wait([each.inbox for each in running], timeout=min(1.0, SECONDS))
        for each in list(running):
            record = _collect(each)
            if record is not None:
                running.remove(each)
                yield replace(record, seconds=round(time.monotonic() - each.started, 2))


def _start(kind: Kind, model_type: str) -> _Running:
    context = multiprocessing.get_context("fork")  # transformers is imported once, not for each type
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(target=_examine_within_limits, args=(kind, model_type, outbox), daemon=True)
    process.start()
    outbox.close()
    record = Record(kind, model_type, model_types(kind)[model_type], "not built")
    return _Running(record, process, inbox, time.monotonic())


def _examine_within_limits(kind: Kind, model_type: str, outbox: Connection) -> None:
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    outbox.send(examine(kind, model_type))


def _collect(each: _Running) -> Record | None:
    """The record, or None while the type still has time."""
    if each.inbox.poll():
        try:
            record: Record = each.inbox.recv()
        except EOFError:
            each.process.join()
            return replace(each.record, reason=f"its process died with {each.process.exitcode}")
        each.process.join()
        return record
    if time.monotonic() - each.started < SECONDS:
        return None
    each.process.kill()
    each.process.join()
    return replace(each.record, reason=f"not done within {SECONDS:.0f} s")


def line(record: Record) -> str:
    """One type for a terminal."""
    numbers = "" if record.error is None else f" error {record.error:.0e}"
    numbers += "" if record.reach is None else f" reach {record.reach:.0e}"
    numbers += f" NOT CAUSAL {record.future:.0e}" if (record.future or 0) > 1e-3 else ""
    head = f"{record.kind:10} {record.model_type:26} {record.outcome:9} {record.seconds:5.1f} s"
    head += f"{record.served:8}{record.lane:12}" if record.served else ""
    told = record.reason or record.served_reason
    return f"{head} {record.parameters / 1e6:5.2f}M{numbers}  {record.layers}  {told}".rstrip()


def write(records: Sequence[Record], file: Path) -> None:
    """As JSON, a line for each record, without what is not known of it."""
    lines = [json.dumps({key: value for key, value in asdict(each).items() if value is not None}) for each in records]
    head = json.dumps({"transformers": transformers.__version__})[:-1]
    file.write_text(f'{head}, "types": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 unless it was given a type that does not exist."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="of all kinds, only these")
    parser.add_argument("--types", nargs="*", help="of all types, only these")
    parser.add_argument("--workers", type=int, default=1, help="types at a time")
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--page", type=Path, help="only write the page there, from what was found last")
    asked = parser.parse_args(arguments)
    if asked.page:
        asked.page.write_text(render(json.loads(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    kinds: Sequence[Kind] = asked.kind or KINDS
    wanted = [(kind, name) for kind in kinds for name in model_types(kind) if not asked.types or name in asked.types]
    if not wanted:
        print("no such type")
        return 2
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    records = []
    for record in survey(wanted, asked.workers):
        records.append(record)
        print(line(record), flush=True)
        if asked.json:
            write(records, asked.json)
    tally = Counter((record.kind, record.outcome) for record in records)
    print(", ".join(f"{kind} {outcome}: {count}" for (kind, outcome), count in sorted(tally.items())))
    return 0
