"""What a run of the benchmark says: times of single requests, figures of a round, and the file that holds them.

Whoever measures something that speaks no HTTP writes the same file (``benchmarks/one_by_one.py`` does).
"""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from lmserve import __version__
from lmserve.errors import LMServeError

FORMAT = 1


class BadResults(LMServeError):
    """A file is no result file."""


class Timing(msgspec.Struct, frozen=True):
    """One finished request; times in seconds of one clock."""

    sent: float
    first_token: float
    last_token: float
    prompt_tokens: int
    completion_tokens: int
    gaps: tuple[float, ...] = ()
    """Between the pieces of text as they came."""

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.sent

    @property
    def per_output_token(self) -> float | None:
        """Mean time of the tokens after the first; None for a single token."""
        if self.completion_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.completion_tokens - 1)


class Figures(msgspec.Struct, frozen=True, omit_defaults=True):
    """One round of one scenario. Times in seconds; None where nothing was measured."""

    output_tokens_per_second: float
    """All output tokens over the time from the first request sent to the last token received."""
    total_tokens_per_second: float
    """The same with the prompts' tokens."""
    time_to_first_token_p50: float | None = None
    time_to_first_token_p95: float | None = None
    per_output_token_p50: float | None = None
    """Of the requests' means."""
    between_pieces_p50: float | None = None
    between_pieces_p95: float | None = None
    """Of all the gaps between two pieces of text."""
    long_prompt_seconds: float | None = None
    """Until the first token of the long prompt, where the scenario has one."""
    num_requests: int = 0
    mean_prompt_tokens: float = 0.0
    mean_completion_tokens: float = 0.0


class ScenarioResult(msgspec.Struct, frozen=True):
    name: str
    description: str
    rounds: list[Figures]

    def median(self, figure: str) -> float | None:
        values = self.values(figure)
        return statistics.median(values) if values else None

    def values(self, figure: str) -> list[float]:
        """Of all rounds."""
        return [value for each in self.rounds if (value := getattr(each, figure)) is not None]


class Results(msgspec.Struct, frozen=True, omit_defaults=True):
    """A result file."""

    contender: str
    facts: dict[str, str]
    scenarios: list[ScenarioResult]
    ready_seconds: float | None = None
    """From the start of the process to its first good answer, where it was started for the run."""
    memory_bytes: int | None = None
    """Resident, of all its processes, after the run."""
    one_by_one: bool = False
    """It serves one request after the other: more streams would get the same throughput."""
    format: int = FORMAT


def merge(results: Sequence[Results]) -> list[Results]:
    """Runs of one contender as one, with the rounds of all: rounds that were measured in turns with others'."""
    merged: list[Results] = []
    for name in dict.fromkeys(each.contender for each in results):
        runs = [each for each in results if each.contender == name]
        rounds: dict[str, ScenarioResult] = {}
        for scenario in (scenario for run in runs for scenario in run.scenarios):
            before = rounds.get(scenario.name)
            rounds[scenario.name] = ScenarioResult(
                scenario.name, scenario.description, [*(before.rounds if before else []), *scenario.rounds]
            )
        ready = [run.ready_seconds for run in runs if run.ready_seconds is not None]
        memory = [run.memory_bytes for run in runs if run.memory_bytes is not None]
        merged.append(
            msgspec.structs.replace(
                runs[0],
                scenarios=list(rounds.values()),
                ready_seconds=statistics.median(ready) if ready else None,
                memory_bytes=max(memory, default=None),
            )
        )
    return merged


def summarise(timings: Sequence[Timing]) -> Figures:
    """The figures of a round; at least one timing."""
    seconds = max(t.last_token for t in timings) - min(t.sent for t in timings)
    num_prompt, num_output = (sum(getattr(t, n) for t in timings) for n in ("prompt_tokens", "completion_tokens"))
    firsts = [t.time_to_first_token for t in timings]
    means = [mean for t in timings if (mean := t.per_output_token) is not None]
    gaps = [gap for t in timings for gap in t.gaps]
    return Figures(
        output_tokens_per_second=num_output / seconds,
        total_tokens_per_second=(num_prompt + num_output) / seconds,
        time_to_first_token_p50=statistics.median(firsts),
        time_to_first_token_p95=percentile(firsts, 0.95),
        per_output_token_p50=statistics.median(means) if means else None,
        between_pieces_p50=statistics.median(gaps) if gaps else None,
        between_pieces_p95=percentile(gaps, 0.95) if gaps else None,
        num_requests=len(timings),
        mean_prompt_tokens=num_prompt / len(timings),
        mean_completion_tokens=num_output / len(timings),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1))]


def machine_facts(command: str) -> dict[str, str]:
    """What a reader needs to judge figures."""
    return {
        "command": command,
        "hardware": f"{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "lmserve": f"{__version__}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(results: Results, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")


def read_results(path: Path) -> Results:
    """Raises BadResults, with the file's name and what is wrong with it."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.DecodeError) as error:
        raise BadResults(f"{path}: {error}") from error
    if results.format != FORMAT:
        raise BadResults(f"{path}: its format is {results.format}, and {FORMAT} can be read")
    return results
