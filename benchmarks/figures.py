"""What is worked out from the times of single requests, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One finished request; times in seconds of one clock."""

    sent: float
    first_token: float
    last_token: float
    prompt_tokens: int
    completion_tokens: int

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.sent

    @property
    def inter_token_latency(self) -> float | None:
        """Mean time between tokens after the first; None for a single token."""
        if self.completion_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender at one number of streams."""

    contender: str
    streams: int
    num_requests: int
    output_tokens_per_second: float
    """All output tokens over the time from the first request sent to the last token received."""
    time_to_first_token_p50: float
    inter_token_latency_p50: float | None
    mean_prompt_tokens: float
    mean_completion_tokens: float
    one_by_one: bool
    """It serves one request after the other: more streams would get the same throughput."""


def summarise(contender: str, streams: int, timings: Sequence[RequestTiming], *, one_by_one: bool = False) -> Figures:
    """The figures of a closed loop of ``streams`` clients; at least one timing."""
    duration = max(t.last_token for t in timings) - min(t.sent for t in timings)
    latencies = [latency for t in timings if (latency := t.inter_token_latency) is not None]
    return Figures(
        contender=contender,
        streams=streams,
        num_requests=len(timings),
        output_tokens_per_second=sum(t.completion_tokens for t in timings) / duration,
        time_to_first_token_p50=statistics.median(t.time_to_first_token for t in timings),
        inter_token_latency_p50=statistics.median(latencies) if latencies else None,
        mean_prompt_tokens=statistics.mean(t.prompt_tokens for t in timings),
        mean_completion_tokens=statistics.mean(t.completion_tokens for t in timings),
        one_by_one=one_by_one,
    )


def ratios(figures: Sequence[Figures], subject: str) -> dict[int, dict[str, float]]:
    """For each number of streams: how many times the subject's throughput is each other contender's."""
    ours = {f.streams: f.output_tokens_per_second for f in figures if f.contender == subject}
    others = [f for f in figures if f.contender != subject]
    return {
        streams: {
            f.contender: throughput / f.output_tokens_per_second for f in others if f.one_by_one or f.streams == streams
        }
        for streams, throughput in ours.items()
    }


def markdown(figures: Sequence[Figures], subject: str, facts: Mapping[str, str]) -> str:
    """A list of the facts, then a row for each contender and number of streams.

    A contender that works one by one has the row of its one stream and is compared at every number of streams below.
    """
    compared = ratios(figures, subject)
    columns = ["contender", "streams", "requests", "output tokens/s", f"{subject} is", "first token p50"]
    columns += ["between tokens p50", "tokens in → out"]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", _row(columns), _row(["---"] * len(columns))]
    for f in sorted(figures, key=lambda f: (f.streams, f.contender != subject)):
        ratio = compared.get(f.streams, {}).get(f.contender)
        lines.append(_row(_cells(f, ratio)))
    for contender in sorted({f.contender for f in figures if f.one_by_one}):
        times = ", ".join(f"{compared[streams][contender]:.1f}× at {streams}" for streams in sorted(compared))
        lines += ["", f"{contender} serves one request after the other; {subject} has {times} streams."]
    return "\n".join(lines)


def _cells(f: Figures, ratio: float | None) -> list[str]:
    latency = f.inter_token_latency_p50
    return [
        f.contender,
        str(f.streams),
        str(f.num_requests),
        f"{f.output_tokens_per_second:.1f}",
        "" if ratio is None else f"{ratio:.1f}×",
        f"{f.time_to_first_token_p50 * 1e3:.0f} ms",
        "" if latency is None else f"{latency * 1e3:.1f} ms",
        f"{f.mean_prompt_tokens:.0f} → {f.mean_completion_tokens:.0f}",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
