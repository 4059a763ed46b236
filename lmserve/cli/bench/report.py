"""Results as a table for people, as Markdown, and two of them compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmserve.cli.bench.results import Results, ScenarioResult

HIGHER_IS_BETTER = ("output_tokens_per_second", "total_tokens_per_second")
LOWER_IS_BETTER = (
    *("time_to_first_token_p50", "time_to_first_token_p95", "per_output_token_p50", "between_pieces_p95"),
    "long_prompt_seconds",
)
COLUMNS = (
    "scenario",
    "contender",
    "output tokens/s",
    "total tokens/s",
    "first token",
    "a token",
    "p95 between",
    "spread",
)


def table(results: Sequence[Results]) -> list[tuple[str, ...]]:
    """A row for each scenario and contender; medians of the rounds, and how far the throughput of rounds lay apart."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(scenario.name for each in results for scenario in each.scenarios):
        for each in results:
            for scenario in each.scenarios:
                if scenario.name == name:
                    rows.append((name, each.contender, *_cells(scenario)))
    return rows


def _cells(scenario: ScenarioResult) -> Iterator[str]:
    for figure in HIGHER_IS_BETTER:
        yield _number(scenario.median(figure))
    for figure in ("time_to_first_token_p50", "per_output_token_p50", "between_pieces_p95"):
        yield _milliseconds(scenario.median(figure))
    values = scenario.values("output_tokens_per_second")
    yield f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""


def overview(results: Sequence[Results]) -> list[str]:
    """Lines of a Markdown table: a row for each contender, a column for each scenario."""
    names = list(dict.fromkeys(scenario.name for each in results for scenario in each.scenarios))
    shown = {name: _shown(results, name) for name in names}
    heads = [f"{name}, {text}" for name, (text, _) in shown.items()]
    lines = [_row(["contender", *heads, "ready"]), _row(["---"] * (len(names) + 2))]
    for each in results:
        found = {name: _find(each, name) for name in names}
        cells = ["" if there is None else _cell(there, shown[name][1]) for name, there in found.items()]
        ready = "" if each.ready_seconds is None else f"{each.ready_seconds:.1f} s"
        lines.append(_row([each.contender, *cells, ready]))
    return lines


def _shown(results: Sequence[Results], name: str) -> tuple[str, str]:
    """What an overview has of a scenario, in words and as a figure: all tokens where prompts are most of the work."""
    scenarios = [there for each in results if (there := _find(each, name)) is not None]
    if any(there.median("long_prompt_seconds") is not None for there in scenarios):
        return "gaps p50 / p95", "gaps"
    output, total = (scenarios[0].median(figure) or 0.0 for figure in HIGHER_IS_BETTER)
    return ("total tokens/s", HIGHER_IS_BETTER[1]) if total > 3 * output else ("output tokens/s", HIGHER_IS_BETTER[0])


def _cell(scenario: ScenarioResult, figure: str) -> str:
    if figure != "gaps":
        return f"{scenario.median(figure):,.0f}"
    return " / ".join(_milliseconds(scenario.median(name)) for name in ("between_pieces_p50", "between_pieces_p95"))


def markdown(results: Sequence[Results]) -> str:
    """What each run was, an overview, then a table in which the first contender is compared with all others."""
    subject = results[0]
    lines = []
    for each in results:
        facts = [f"{name}: {value}" for name, value in each.facts.items()]
        if each.ready_seconds is not None:
            facts.append(f"ready after {each.ready_seconds:.1f} s")
        if each.memory_bytes is not None:
            facts.append(f"{each.memory_bytes / 2**20:.0f} MiB resident")
        lines.append(f"- {each.contender}: {'; '.join(facts)}")
    lines += ["", *overview(results), ""]
    lines += [_row([*COLUMNS, f"{subject.contender} is"]), _row(["---"] * (len(COLUMNS) + 1))]
    for row in table(results):
        lines.append(_row([*row, _times(subject, results, *row[:2])]))
    described = {s.name: s.description for each in results for s in each.scenarios}
    return "\n".join([*lines, "", *(f"{name}: {text}." for name, text in described.items())])


def _times(subject: Results, results: Sequence[Results], scenario: str, contender: str) -> str:
    """How many times the throughput of another: of all tokens where prompts are most of the work."""
    if contender == subject.contender:
        return ""
    (other,) = (each for each in results if each.contender == contender)
    ours, theirs = (_find(each, scenario) for each in (subject, other))
    if ours is None or theirs is None:
        return ""
    mine, yours = (each.median("total_tokens_per_second") for each in (ours, theirs))
    return f"{mine / yours:.2f} ×" if mine and yours else ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one scenario in two runs."""

    scenario: str
    figure: str
    before: float
    after: float
    ratio: float
    """Over 1 is better, for throughput and for times."""
    verdict: str
    """better, worse, or within spread: the ranges of the rounds overlap."""


def compare(before: Results, after: Results) -> list[Comparison]:
    """Scenarios that both have, in the order of the second."""
    found = []
    for scenario in after.scenarios:
        other = _find(before, scenario.name)
        if other is None:
            continue
        for figure in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
            old, new = other.values(figure), scenario.values(figure)
            if old and new:
                found.append(_compare(other, scenario, figure))
    return found


def _compare(before: ScenarioResult, after: ScenarioResult, figure: str) -> Comparison:
    old, new = before.median(figure) or 0.0, after.median(figure) or 0.0
    worst, best = (min, max) if figure in HIGHER_IS_BETTER else (max, min)
    ratio = new / old if figure in HIGHER_IS_BETTER else old / new
    better = _is_better(figure, worst(after.values(figure)), best(before.values(figure)))
    worse = _is_better(figure, worst(before.values(figure)), best(after.values(figure)))
    return Comparison(
        after.name, figure, old, new, ratio, "better" if better else "worse" if worse else "within spread"
    )


def _is_better(figure: str, one: float, other: float) -> bool:
    return one > other if figure in HIGHER_IS_BETTER else one < other


def comparison_rows(found: Sequence[Comparison]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for each in found:
        show = _number if each.figure in HIGHER_IS_BETTER else _milliseconds
        rows.append(
            (each.scenario, each.figure, show(each.before), show(each.after), f"{each.ratio:.2f} ×", each.verdict)
        )
    return rows


def _find(results: Results, name: str) -> ScenarioResult | None:
    return next((scenario for scenario in results.scenarios if scenario.name == name), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
