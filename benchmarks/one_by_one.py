"""``model.generate``, one prompt after the other: the script that people have before they have a server.

    python -m benchmarks.one_by_one MODELFOLDER [--dtype bfloat16] [--rounds 3] [--requests 6] --output FILE

Writes a result file as ``lmserve bench`` does, of its scenario s1. One prompt is run before the clock starts.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contenders import model_folder, positive
from lmserve.cli.bench.prompts import words
from lmserve.cli.bench.results import Results, ScenarioResult, Timing, machine_facts, summarise, write_results
from lmserve.cli.bench.scenarios import SCENARIOS


class FirstTokenClock:
    """A streamer, as ``generate`` calls them, that notes when the first new token comes."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self._had_prompt = False

    def put(self, _: torch.Tensor) -> None:
        if self._had_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        self._had_prompt = True

    def end(self) -> None:
        """Nothing to flush."""


def run(model: Any, ids: torch.Tensor, new_tokens: int) -> Timing:
    """One greedy answer of exactly ``new_tokens`` tokens."""
    clock = FirstTokenClock()
    sent = time.perf_counter()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **length)
    last = time.perf_counter()
    return Timing(sent, clock.first_token or last, last, ids.shape[1], output.shape[1] - ids.shape[1])


def load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The tokenizer and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    # Greedy: generate warns of sampling parameters that it will not use.
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return AutoTokenizer.from_pretrained(folder), model


def measure(folder: Path, dtype: str, rounds: int, requests: int, new_tokens: int) -> Results:
    """The figures of ``rounds`` rounds of ``requests`` prompts, which share no beginning."""
    tokenizer, model = load(folder, dtype)
    scenario = SCENARIOS["s1"]

    def prompt(seed: str) -> torch.Tensor:
        messages = [{"role": "user", "content": words(scenario.prompt_tokens, seed)}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return torch.tensor([ids[: scenario.prompt_tokens]])

    run(model, prompt("warm"), new_tokens)
    figures = [
        summarise([run(model, prompt(f"{number}.{i}"), new_tokens) for i in range(requests)])
        for number in range(rounds)
    ]
    facts = {**machine_facts(shlex.join(["python", "-m", "benchmarks.one_by_one", *sys.argv[1:]])), "dtype": dtype}
    result = ScenarioResult(scenario.name, scenario.description, figures)
    return Results("model.generate", facts, [result], one_by_one=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.one_by_one")
    parser.add_argument("model", type=model_folder, help="a local model folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--requests", type=positive, default=SCENARIOS["s1"].num_requests)
    parser.add_argument("--new-tokens", type=positive, default=SCENARIOS["s1"].new_tokens)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    results = measure(options.model, options.dtype, options.rounds, options.requests, options.new_tokens)
    write_results(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
