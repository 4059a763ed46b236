"""Output tokens per second over HTTP, beside ``model.generate`` one by one and ``transformers serve``, in one run.

    python -m benchmarks.serving MODELFOLDER [--quick] [--no-peers] [--streams 1,8,32] [--json FILE]

Load: streaming chat completions, greedy, in a closed loop; prompts of 128 tokens that share no beginning, 128 new
tokens each, the end of sequence ignored where the server can ("tokens in → out" shows what came). One contender runs at
a time, on all cores, the client beside it; each is warmed up with as many requests as it will get at once. Compare
ratios within a run: the figures themselves belong to the machine and to what else it did.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil
from transformers import AutoTokenizer

from benchmarks.contenders import (
    ContenderError,
    Machine,
    Server,
    free_port,
    generate_one_by_one,
    lmserve_command,
    transformers_command,
)
from benchmarks.figures import Figures, markdown, ratios, summarise
from benchmarks.load_generator import LoadError, Target, closed_loop, make_prompts
from lmserve import __version__

OURS, GENERATE, TRANSFORMERS = "lmserve", "model.generate", "transformers serve"
WARM_UP_SEED = 10_000


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=model_folder, help="a local model folder")
    parser.add_argument("--streams", type=_stream_list, default=(1, 8, 32), help="numbers of streams, as 1,8,32")
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--new-tokens", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=2, help="requests that each stream sends")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument(
        "--quick", action="store_true", help="one round of 32 new tokens: does it run, roughly how fast"
    )
    parser.add_argument("--no-peers", action="store_true", help="lmserve alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.rounds, parsed.new_tokens = 1, min(parsed.new_tokens, 32)
    return parsed


class Run:
    """One run of the benchmark: the same prompts for every contender."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._machine = Machine(str(options.model), options.device, options.dtype, options.threads)
        self._count_tokens = _token_counter(options.model)

    def figures(self) -> list[Figures]:
        """Measures every contender, one after the other."""
        result = self._server(OURS, lmserve_command, {"ignore_eos": True, "stream_options": {"include_usage": True}})
        if not self._options.no_peers:
            result += self._generate()
            result += self._server(TRANSFORMERS, transformers_command, {})
        return result

    def _server(
        self, name: str, command: Callable[[Machine, int], list[str]], extra_body: dict[str, Any]
    ) -> list[Figures]:
        _say(f"{name}: starting")
        port = free_port()
        with Server(command(self._machine, port), port, self._machine.environment) as server:
            target = Target(server.base_url, self._machine.model, extra_body)
            try:
                return [self._measure(name, target, streams) for streams in self._options.streams]
            except (LoadError, httpx.HTTPError) as error:
                raise ContenderError(f"{name}: {error}\n{server.last_words()}") from error

    def _measure(self, name: str, target: Target, streams: int) -> Figures:
        warm_up = self._prompts(streams, WARM_UP_SEED + streams)
        asyncio.run(closed_loop(target, warm_up, streams=streams, max_tokens=8))
        prompts = self._prompts(streams * self._num_rounds(streams), streams)
        timings = asyncio.run(closed_loop(target, prompts, streams=streams, max_tokens=self._options.new_tokens))
        return _say_figures(summarise(name, streams, timings))

    def _generate(self) -> list[Figures]:
        _say(f"{GENERATE}: starting")
        prompts = self._prompts(self._num_rounds(1), 1)
        timings = generate_one_by_one(self._machine, prompts, self._options.new_tokens)
        return [_say_figures(summarise(GENERATE, 1, timings, one_by_one=True))]

    def _num_rounds(self, streams: int) -> int:
        """A single stream sends more, as each of its requests weighs more."""
        rounds: int = self._options.rounds
        return rounds * 4 if streams == 1 else rounds

    def _prompts(self, number: int, seed: int) -> list[str]:
        return make_prompts(self._count_tokens, number=number, num_tokens=self._options.prompt_tokens, seed=seed)


def facts(options: argparse.Namespace) -> dict[str, str]:
    """What a reader needs to judge the table."""
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return {
        "command": f"python -m benchmarks.serving {options.model.name} "
        f"--prompt-tokens {options.prompt_tokens} --new-tokens {options.new_tokens} --rounds {options.rounds}",
        "hardware": f"{_processor()}, {options.threads} threads, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "device, dtype": f"{options.device}, {options.dtype}",
        "versions": f"lmserve {__version__}, {libraries}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


EXIT_TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # unwinds, so that the contender is ended too
    try:
        figures = Run(options).figures()
    except ContenderError as error:
        print(error, file=sys.stderr)
        return 1
    described = facts(options)
    print(markdown(figures, OURS, described))
    if options.json:
        report = {"facts": described, "figures": [asdict(f) for f in figures], "ratios": ratios(figures, OURS)}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _token_counter(model: Path) -> Callable[[str], int]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(prompt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return count


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_figures(figures: Figures) -> Figures:
    _say(f"{figures.contender}, {figures.streams} streams: {figures.output_tokens_per_second:.1f} output tokens/s")
    return figures


def model_folder(value: str) -> Path:
    path = Path(value)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{value} is not a model folder: it has no config.json")
    return path.resolve()


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return number


def _stream_list(value: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in value.split(",")}))


if __name__ == "__main__":
    sys.exit(main())
