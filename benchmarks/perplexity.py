"""What a number format costs in quality: the perplexity of a text, beside that of float32 weights.

    python -m benchmarks.perplexity MODELFOLDER [--formats bfloat16 int8 int4] [--no-tiles] [--text FILE ...]

The text, this repository's own documents unless others are named, is cut into windows of tokens. The engine reads each
from its beginning, as it would read a prompt, and gives every token's log-probability; the perplexity is e to the mean
of them, negated. Besides, how often the most likely token is that of float32, and what memory the weights take.
``--no-tiles`` computes as processors without AMX do.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.contenders import model_folder, positive
from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.runtime.build import build_runner
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.native import program, weights
from lmserve.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
FORMATS = ("bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as one model reads it."""

    info: RunnerInfo
    surprise: float
    """The mean of the tokens' log-probabilities, negated."""
    guesses: list[int]
    """The most likely token at each place."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise)


def read(model: Path, number_format: str, windows: Sequence[Sequence[int]]) -> Reading:
    """Loads the model with such weights and reads all windows, those of one step together."""
    quantized = number_format in ("int8", "int4")
    config = ModelConfig(
        model=str(model),
        dtype="bfloat16" if quantized else number_format,
        quantization=number_format if quantized else "none",
    )
    runner = build_runner(config)
    limits = SchedulerConfig(
        max_num_seqs=runner.info.max_num_seqs,
        max_num_batched_tokens=runner.info.max_num_batched_tokens,
        max_model_len=runner.info.max_model_len,
    )
    core = EngineCore(runner, limits)
    for number, window in enumerate(windows):
        core.add_request(AddRequest(f"{number:08}", list(window), SamplingParams(max_tokens=0, prompt_logprobs=1)))
    scored: dict[str, list[tuple[float, int]]] = {}
    while core.has_work:
        for output in core.step():
            found = scored.setdefault(output.request_id, [])
            found += [(entry.logprob, entry.top[0][0]) for entry in output.prompt_logprobs]
    everything = [entry for name in sorted(scored) for entry in scored[name]]
    assert len(everything) == sum(len(window) - 1 for window in windows)
    surprise = -math.fsum(logprob for logprob, _ in everything) / len(everything)
    return Reading(runner.info, surprise, [guess for _, guess in everything])


def agreement(reading: Reading, other: Reading) -> float:
    """How often two guess the same."""
    pairs = list(zip(reading.guesses, other.guesses, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def cut(model: Path, texts: Sequence[Path], window: int) -> list[list[int]]:
    """Windows of that many tokens; what is left at the end is dropped."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    ids = AutoTokenizer.from_pretrained(model)(text, verbose=False).input_ids
    return [ids[first : first + window] for first in range(0, len(ids) - window + 1, window)]


def documents() -> list[Path]:
    """This repository's."""
    return [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def _facts(info: RunnerInfo) -> str:
    return f"{info.weight_bytes / 1e6:3.0f} MB  {info.lane}, {info.dtype}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.perplexity")
    parser.add_argument("model", type=model_folder, help="a local model folder")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--window", type=positive, default=512, help="tokens that are read with one another")
    parser.add_argument("--text", nargs="+", type=Path, default=documents())
    parser.add_argument("--no-tiles", action="store_true", help="as on a processor without AMX")
    options = parser.parse_args(arguments)
    if options.no_tiles:
        for module in (weights, program):
            module.__dict__["has_tiles"] = lambda: False
    windows = cut(options.model, options.text, options.window)
    if not windows or options.window < 2:
        parser.error("the text has less than one window of at least two tokens")
    first = read(options.model, "float32", windows)
    print(f"{len(first.guesses)} tokens in windows of {options.window}")
    print("weights   perplexity  over float32  same guess  memory  computed by")
    print(f"float32   {first.perplexity:10.3f}  {'':12}  {'':10}  {_facts(first.info)}")
    for number_format in options.formats:
        reading = read(options.model, number_format, windows)
        loss = math.exp(reading.surprise - first.surprise) - 1
        print(
            f"{number_format:9} {reading.perplexity:10.3f}  {loss:+12.2%}  {agreement(reading, first):10.1%}"
            f"  {_facts(reading.info)}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
