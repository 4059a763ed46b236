"""Throughput of several runs, side by side, as a picture. Needs the extra ``bench``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmserve.cli.bench.results import Results
from lmserve.errors import LMServeError


class NoPlot(LMServeError):
    """The picture cannot be drawn."""


def plot(results: Sequence[Results], path: Path) -> None:
    """Writes an SVG, PNG or PDF, as the path says: total tokens/s of each scenario, with the range of the rounds.

    Raises:
        NoPlot: matplotlib is not installed, or does not write such files.
    """
    try:
        figure: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise NoPlot("--plot needs matplotlib: pip install 'lmserve[bench]'") from error
    names = list(dict.fromkeys(scenario.name for each in results for scenario in each.scenarios))
    drawn = figure.Figure(figsize=(2 + 1.6 * len(names), 4.5), layout="constrained")
    axes = drawn.subplots()
    width = 0.8 / len(results)
    for index, each in enumerate(results):
        values = {scenario.name: scenario.values("total_tokens_per_second") for scenario in each.scenarios}
        middles = {scenario.name: scenario.median("total_tokens_per_second") for scenario in each.scenarios}
        there = [name for name in names if middles.get(name) is not None]
        places = [names.index(name) + (index - (len(results) - 1) / 2) * width for name in there]
        heights = [middles[name] for name in there]
        below = [middles[name] - min(values[name]) for name in there]  # type: ignore[operator]
        above = [max(values[name]) - middles[name] for name in there]  # type: ignore[operator]
        axes.bar(places, heights, width, yerr=[below, above], label=each.contender)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("tokens/s, prompts and outputs")
    axes.legend()
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise NoPlot(f"--plot: {error}") from error
