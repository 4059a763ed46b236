"""OpenVINO GenAI's own continuous batching, in process: no HTTP, as many prompts a call as a scenario has streams.

    python -m benchmarks.openvino_genai MODEL [--scenario s8] [--rounds 3] --output FILE

MODEL is a GGUF file or an OpenVINO folder. Writes a result file as ``lmserve bench`` does, of its scenarios without a
long or a shared prompt, with throughput only. It runs in an environment of its own: ``benchmarks/peers.md``.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmserve.cli.bench.prompts import words
from lmserve.cli.bench.results import Figures, Results, ScenarioResult, machine_facts, write_results
from lmserve.cli.bench.scenarios import SCENARIOS, Scenario

NAMES = ("s1", "s8", "s32", "prefill")
CACHE_GIB = 2
BUDGET = 512
MAX_NUM_SEQS = 64


def make_prompt(tokenizer: Any, num_tokens: int, seed: str) -> str:
    """Of that many tokens, or one or two fewer."""
    count = num_tokens
    while True:
        text = words(count, seed)
        found = int(tokenizer.encode(text).input_ids.shape[1])
        if found <= num_tokens:
            return text
        count -= max(1, (found - num_tokens) // 2)


def measure(genai: Any, model: str, scenario: Scenario, rounds: int) -> tuple[list[Figures], float]:
    """A round's figures each, and the seconds until the model was there."""
    began = time.monotonic()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = CACHE_GIB, BUDGET
    scheduler.max_num_seqs = MAX_NUM_SEQS
    pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler)
    ready = time.monotonic() - began
    asked = genai.GenerationConfig()
    asked.max_new_tokens, asked.ignore_eos, asked.do_sample = scenario.new_tokens, True, False
    asked.apply_chat_template = False
    tokenizer = pipeline.get_tokenizer()
    pipeline.generate([make_prompt(tokenizer, scenario.prompt_tokens, "warm")], asked)
    figures = []
    for number in range(rounds):
        prompts = [
            make_prompt(tokenizer, scenario.prompt_tokens, f"{scenario.name}.{number}.{i}")
            for i in range(scenario.num_requests)
        ]
        began = time.perf_counter()
        for first in range(0, len(prompts), scenario.streams):
            pipeline.generate(prompts[first : first + scenario.streams], asked)
        seconds = time.perf_counter() - began
        num_output = scenario.num_requests * scenario.new_tokens
        num_all = num_output + scenario.num_requests * scenario.prompt_tokens
        figures.append(Figures(num_output / seconds, num_all / seconds, num_requests=scenario.num_requests))
    return figures, ready


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.openvino_genai")
    parser.add_argument("model", help="a GGUF file, or a folder in OpenVINO's own format")
    parser.add_argument("--scenario", action="append", choices=NAMES, help="may be repeated; else all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="OpenVINO GenAI, in process")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    genai = importlib.import_module("openvino_genai")
    results, seconds = [], []
    for name in options.scenario or NAMES:
        figures, ready = measure(genai, options.model, SCENARIOS[name], options.rounds)
        results.append(ScenarioResult(name, SCENARIOS[name].description, figures))
        seconds.append(ready)
        print(f"{name}: {figures[-1].total_tokens_per_second:.0f} tokens/s", file=sys.stderr)
    facts = machine_facts(shlex.join(["python", "-m", "benchmarks.openvino_genai", *sys.argv[1:]]))
    facts["openvino_genai"] = str(genai.__version__)
    write_results(Results(options.name, facts, results, ready_seconds=min(seconds)), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
