"""Throughput of a hybrid model: many streams at once, the same one by one, and ``model.generate`` one by one.

    python -m benchmarks.hybrid [--streams 16] [--prompt 128] [--tokens 64] [--rounds 3] [--dtype bfloat16] [--tiny]

Random weights of the shape of LFM2-350M (ten short convolutions, six layers of attention), the engine in this process,
no HTTP. The three take turns in each round, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Lfm2Config, PreTrainedModel

from benchmarks.contenders import positive
from lmserve import __version__
from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore, limits_of
from lmserve.engine.messages import AddRequest
from lmserve.runtime.build import assemble_runner
from lmserve.sampling_params import SamplingParams

ATTENTION = (2, 5, 8, 10, 12, 14)
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4608,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 65_536,
    "layer_types": ["full_attention" if i in ATTENTION else "conv" for i in range(16)],
}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
CONTENDERS = ("generate", "alone", "together")
WHAT = {"generate": "model.generate, one by one", "alone": "lmserve, one by one", "together": "lmserve, all at once"}


class Contest:
    """Two models of the same weights: transformers' and the engine's."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._stock = self._make()
        config = ModelConfig(
            model="random", max_model_len=2 * (options.prompt + options.tokens), max_num_seqs=options.streams
        )
        self._runner = assemble_runner(self._make(), config, self._dtype)
        self._names = count()
        info = self._runner.info
        self.lane = info.lane
        limits = limits_of(info, prefix_caching=False)  # each round computes its prompts
        self._engine = EngineCore(self._runner, limits)

    def tokens_per_second(self, contender: str) -> float:
        """New tokens of all streams."""
        options = self._options
        draw = torch.Generator().manual_seed(1)
        prompts = torch.randint(10, 500, (options.streams, options.prompt), generator=draw).tolist()
        began = time.perf_counter()
        if contender == "together":
            self._serve(prompts)
        else:
            for prompt in prompts:
                self._serve([prompt]) if contender == "alone" else self._generate(prompt)
        seconds = time.perf_counter() - began
        return float(options.streams * options.tokens / seconds)

    def _make(self) -> PreTrainedModel:
        torch.manual_seed(1)
        make: Any = AutoModelForCausalLM.from_config
        shape = {**SHAPE, **TINY} if self._options.tiny else SHAPE
        model: PreTrainedModel = make(Lfm2Config(**shape), dtype=self._dtype)
        model.train(False)
        return model

    def _serve(self, prompts: Sequence[list[int]]) -> None:
        sampling = SamplingParams(max_tokens=self._options.tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            self._engine.add_request(AddRequest(str(next(self._names)), prompt, sampling))
        while self._engine.has_work:
            for output in self._engine.step():
                if output.error:
                    raise RuntimeError(output.error)

    def _generate(self, prompt: list[int]) -> None:
        ids = torch.tensor([prompt])
        make: Any = GenerationConfig
        wanted = make(max_new_tokens=self._options.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        generate: Any = self._stock.generate
        with torch.inference_mode():
            generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)


def report(options: argparse.Namespace, lane: str, rounds: Sequence[dict[str, float]]) -> Iterator[str]:
    """What was seen, and the ratios."""
    yield f"lmserve {__version__}, torch {torch.__version__}, {options.dtype}, {options.threads} threads, {lane} lane"
    yield f"{options.streams} streams, {options.prompt} tokens in, {options.tokens} out"
    for contender in CONTENDERS:
        yield f"{WHAT[contender]}: {statistics.median(each[contender] for each in rounds):.1f} tokens/s"
    for other in ("alone", "generate"):
        ratio = statistics.median(each["together"] / each[other] for each in rounds)
        yield f"all at once against {WHAT[other]}, median: {ratio:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    contest = Contest(options)
    rounds = []
    for _ in range(options.rounds):
        rounds.append({contender: contest.tokens_per_second(contender) for contender in CONTENDERS})
    print("\n".join(f"- {line}" for line in report(options, contest.lane, rounds)))
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.hybrid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=positive, default=16)
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=positive, default=64, help="of each answer")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model for trying the benchmark itself")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
