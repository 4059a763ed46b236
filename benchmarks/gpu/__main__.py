"""Measures what a GPU can do and what part of it lmserve gets. Needs no network and no model: weights are random.

    python -m benchmarks.gpu [--budget 540] [--only serving,steps] [--models qwen3-8b] [--output FILE]
    python -m benchmarks.gpu --device cpu --tiny

Each section runs in a process of its own, so that one that fails, hangs, or breaks the device costs only itself. The
results are in the file after each section. ``--tiny`` shows on any machine that the benchmark itself works.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import judge
from benchmarks.gpu.environment import ROOT, ask
from benchmarks.gpu.limits import limits_of
from benchmarks.gpu.optional import missing
from benchmarks.gpu.report import aim_lines, environment_lines, section_lines
from benchmarks.gpu.results import Section
from benchmarks.gpu.run_section import run_section
from benchmarks.gpu.sections import LIMITS, MODULES, Job, chosen
from benchmarks.gpu.setting import Limits, Setting
from benchmarks.gpu.shapes import model_names

BUDGET = 540.0
LEAST_SECONDS = 10.0
"""A section that has less left is not begun."""
NO_TIME = "the time was used up"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    lacking = missing()
    if lacking:
        print(f"these packages are needed: {', '.join(lacking)}", file=sys.stderr)
        return 1
    try:
        environment = ask(options.device)
    except RuntimeError as error:
        print(f"{error}; --device cpu --tiny tries the benchmark itself", file=sys.stderr)
        return 1
    print("\n".join(environment_lines(environment)), flush=True)
    if options.tiny:
        print("tiny: shrunken models, to see that the benchmark runs. No figure here says anything about the device.")
    content = {"environment": environment, "arguments": list(sys.argv[1:] if arguments is None else arguments)}
    sections: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="lmserve-bench-") as scratch:
        for section in run_all(options, chosen(options.only, options.models), Path(scratch)):
            sections.append(section)
            print("\n".join(section_lines(section)), flush=True)
            write(options.output, content, sections, options)
    print("\n".join(aim_lines(judge(sections, environment["device"], tiny=options.tiny))))
    print(f"\n{options.output}")
    return int(any(section.status == "failed" for section in sections))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shrunken models and few rounds; judges no aim")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default %(default)s)")
    parser.add_argument("--only", type=_names(list(MODULES)), default=[], help=f"sections: {', '.join(MODULES)}")
    parser.add_argument("--models", type=_names(model_names()), default=[], help=f"models: {', '.join(model_names())}")
    parser.add_argument("--output", type=Path, help="file for the results, JSON (default: in benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("a CPU is only there to try the benchmark: --device cpu needs --tiny")
    options.output = options.output or _default_output(options.tiny)
    return options


def _names(known: list[str]) -> Any:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]}; there are {', '.join(known)}")
        return names

    return read


def _default_output(tiny: bool) -> Path:
    """A tiny run's figures are none: they are kept apart from results."""
    name = f"gpu-{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.json"
    return Path(tempfile.gettempdir()) / f"lmserve-tiny-{name}" if tiny else ROOT / "benchmarks" / "results" / name


def run_all(options: argparse.Namespace, jobs: list[Job], scratch: Path) -> Iterator[Section]:
    """Yields each job's section when it has ended."""
    ends = time.monotonic() + options.budget
    limits = Limits()
    for job in jobs:
        left = ends - time.monotonic()
        if left < min(LEAST_SECONDS, job.most_seconds):
            yield Section(job.section, job.model, "skipped", NO_TIME)
            continue
        setting = Setting(options.device, options.tiny, job.model, limits)
        section = run_section(job, setting, min(left, job.most_seconds), scratch)
        if job.section == LIMITS:
            limits = limits_of(section.rows)
        yield section


def write(path: Path, content: dict[str, Any], sections: list[Section], options: argparse.Namespace) -> None:
    """All that is known by now. A run that is stopped while it writes leaves the file as it was."""
    verdicts = judge(sections, content["environment"]["device"], tiny=options.tiny)
    whole = {
        **content,
        "tiny": options.tiny,
        "sections": [section.to_json() for section in sections],
        "aims": [verdict.to_json() for verdict in verdicts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the section that runs is ended, too
    sys.exit(main())
