"""Where a step of the native program goes, and how near it is to what the machine can do.

    python -m benchmarks.native_step MODELFOLDER [--quantization int8] [--context 192]

First the machine, in the same run: how fast it reads memory, how fast its products are, and what it takes to make a
large page. From the first two a step has a shortest time: it reads the weights and the cache once, and multiplies. Then
steps of rows that decode, and of a prompt's chunk: how long each takes, what part of that is the shortest time, and
which operations have it. Last, what the engine adds to a step of 32 rows: scheduling, preparing, sampling.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.contenders import model_folder, positive
from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.runtime.attention.base import Span
from lmserve.runtime.build import build_runner
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.native.program import Program
from lmserve.runtime.native.weights import PackedWeight, linear
from lmserve.runtime.pages import HUGE_PAGE, populate, zeros
from lmserve.sampling_params import SamplingParams

READ_BYTES = 2**29
TIMES = 20
CHUNK = 512
STREAMS = 32
NUM_PAGES = 128
PROMPT = 100


@dataclass(frozen=True, slots=True)
class Machine:
    """What this machine does at best just now."""

    bytes_per_second: float
    operations_per_second: float
    """Multiplications and additions of bfloat16 products."""
    page_seconds: float
    """For the system to make a page of 2 MiB that was not there; 0 if it cannot be asked to."""


def best(function: Callable[[], object], times: int = TIMES) -> float:
    """Seconds of the quickest of several calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def measure_machine() -> Machine:
    numbers = torch.ones(READ_BYTES // 4)
    rows, size = 512, 1024
    weight = PackedWeight("bfloat16", [size], size)
    weight.pack(0, torch.randn(size, size).bfloat16())
    x = torch.randn(rows, size).bfloat16()
    threads = torch.get_num_threads()
    reading = READ_BYTES / best(numbers.sum, 5)
    products = 2 * rows * size * size / best(lambda: linear(weight.parts[0], x, threads))
    pages = zeros(NUM_PAGES * HUGE_PAGE)
    began = time.perf_counter()
    made = populate(pages)
    return Machine(reading, products, (time.perf_counter() - began) / NUM_PAGES if made else 0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One step's input: so many sequences with a context each, and so many new tokens of each."""

    sequences: int
    tokens: int
    context: int

    def run(self, program: Program, info: RunnerInfo) -> None:
        block_size = info.block_size
        length = self.context + self.tokens
        blocks = -(-length // block_size)
        spans = [
            Span(i * self.tokens, self.tokens, length, list(range(1 + i * blocks, 1 + (i + 1) * blocks)))
            for i in range(self.sequences)
        ]
        positions = torch.arange(self.context, length).repeat(self.sequences)
        slots = torch.cat(
            [
                torch.tensor(
                    [s.block_table[p // block_size] * block_size + p % block_size for p in range(self.context, length)]
                )
                for s in spans
            ]
        )
        ids = torch.randint(3, info.vocab_size, (len(positions),))
        kept = torch.arange(self.tokens - 1, len(positions), self.tokens)
        with torch.inference_mode():
            program.run(ids, positions, slots, kept, spans)

    def shortest(self, machine: Machine, program: Program, info: RunnerInfo) -> float:
        """Seconds: the memory read once, or the products done at the best rate, whichever takes longer."""
        weights, operations = program.work(self.sequences * self.tokens, self.sequences)
        cache = info.kv_cache_bytes // info.num_blocks // info.block_size
        moved = weights + self.sequences * (self.context + self.tokens) * cache
        return max(moved / machine.bytes_per_second, operations / machine.operations_per_second)


def describe(step: Step, runner: PackedModelRunner, program: Program, machine: Machine) -> str:
    """One line about a step."""
    times: list[np.ndarray] = []

    def once() -> None:
        program.times = np.zeros(len(program.kinds), np.int64)
        step.run(program, runner.info)
        times.append(program.times)

    for _ in range(TIMES):
        once()
    program.times = None
    quickest = min(times, key=lambda each: int(each.sum()))
    parts: defaultdict[str, float] = defaultdict(float)
    for kind, nanoseconds in zip(program.kinds, quickest, strict=True):
        parts[kind] += nanoseconds / 1e6
    total = sum(parts.values())
    share = step.shortest(machine, program, runner.info) * 1e3 / total
    what = ", ".join(f"{kind} {parts[kind]:.1f}" for kind in sorted(parts, key=lambda kind: -parts[kind])[:4])
    name = f"{step.sequences} x {step.tokens} tokens behind {step.context}"
    return f"{name:28} {total:7.1f} ms  {share:5.0%} of the limit   {what}"


def engine_overhead(runner: PackedModelRunner, program: Program) -> str:
    """What is not the program in an engine's steps of 32 rows."""
    info = runner.info
    limits = SchedulerConfig(
        max_num_seqs=info.max_num_seqs, max_num_batched_tokens=info.max_num_batched_tokens, max_model_len=512
    )
    core = EngineCore(runner, limits)
    sampling = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    for number in range(STREAMS):
        core.add_request(AddRequest(str(number), [5 + number] * PROMPT, sampling))
    for _ in range(40):
        core.step()
    shares, seconds = [], []
    for _ in range(100):
        program.times = np.zeros(len(program.kinds), np.int64)
        began = time.perf_counter()
        core.step()
        took = time.perf_counter() - began
        seconds.append(took)
        shares.append(1 - program.times.sum() / 1e9 / took)
    program.times = None
    middle = sorted(shares)[len(shares) // 2]
    return f"engine, {STREAMS} rows: {sorted(seconds)[50] * 1e3:.1f} ms a step, {middle:.1%} of it outside the program"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.native_step")
    parser.add_argument("model", type=model_folder, help="a local model folder")
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--context", type=positive, default=192, help="tokens that each row has behind it")
    options = parser.parse_args(arguments)
    config = ModelConfig(model=str(options.model), dtype="bfloat16", quantization=options.quantization)
    runner = build_runner(config)
    program = runner.program
    if not isinstance(program, Program):
        print("there is no native program for this model on this machine", file=sys.stderr)
        return 1
    machine = measure_machine()
    print(
        f"memory {machine.bytes_per_second / 1e9:.1f} GB/s, products {machine.operations_per_second / 1e9:.0f} GFLOP/s,"
        f" {machine.page_seconds * 1e3:.1f} ms for a new page of 2 MiB,"
        f" weights {runner.info.weight_bytes / 1e6:.0f} MB, {runner.info.dtype}"
    )
    steps = (
        *(Step(rows, 1, options.context) for rows in (1, 8, STREAMS)),
        Step(1, CHUNK, 0),
        Step(1, CHUNK, CHUNK),
        Step(1, 16, 4 * CHUNK),
        Step(4, 1, 2 * CHUNK),
    )
    for step in steps:
        print(describe(step, runner, program, machine), flush=True)
    print(engine_overhead(runner, program))
    return 0


if __name__ == "__main__":
    sys.exit(main())
