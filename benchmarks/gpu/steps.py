"""How long a step of decodes takes: captured, compiled, and as the model is written; of how many operations it is, and
whether a row has the same bits in any company."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import Served, serve
from benchmarks.gpu.operations import count_operations, in_layers
from benchmarks.gpu.results import Row, attempt
from benchmarks.gpu.roofline import decode_step
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import make_model, read_config
from benchmarks.gpu.streams import prompts
from lmserve.engine.messages import AddRequest
from lmserve.outputs import TokenLogprobs
from lmserve.runtime.interface import NewSequence, ScheduledChunk, StepInput
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.packed_lane import CompiledParts
from lmserve.runtime.self_check import TOLERANCE
from lmserve.sampling_params import SamplingParams

ROWS, TINY_ROWS = (1, 8, 32, 256), (1, 4)
COMPANY, TINY_COMPANY = (2, 8, 32, 256), (2, 8)
CONTEXT, TINY_CONTEXT = 1024, 32
ROUNDS, STEPS, WARM_UPS = 3, 24, 6
TINY_STEPS = 2
PROFILED_ROWS, TINY_PROFILED_ROWS = 32, 4
NUM_TOP = 20
"""Log-probabilities that are compared: of the likeliest tokens."""
CHECKED_TOKENS = 64
"""Of the prompt whose log-probabilities are compared with those of the stock forward."""
GREEDY = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
WITH_LOGPROBS = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True, logprobs=NUM_TOP)


class Decodes:
    """Sequences that decode, without an engine: each has a context, whose keys and values are random."""

    def __init__(self, runner: PackedModelRunner, rows: int, context: int, sampling: SamplingParams = GREEDY) -> None:
        info = runner.info
        self._runner, self._rows, self._context, self._sampling = runner, rows, context, sampling
        blocks = -(-(context + 2 + WARM_UPS + ROUNDS * STEPS) // info.block_size)
        if rows * blocks > info.num_blocks:
            raise ValueError(f"{rows} x {context} tokens do not fit into {info.kv_cache_tokens} of KV cache")
        self._tables = [list(range(slot * blocks, (slot + 1) * blocks)) for slot in range(rows)]
        self._done = 0

    def launch(self) -> None:
        """The next step. The first one tells the runner who is there."""
        position = self._context - 1 + self._done
        chunks = [ScheduledChunk(slot, position, 1, table, samples=True) for slot, table in enumerate(self._tables)]
        self._runner.launch(StepInput(chunks, [] if self._done else self._sequences()))
        self._done += 1

    def _sequences(self) -> list[NewSequence]:
        vocab_size = self._runner.info.vocab_size
        tokens = [tuple((7 + 31 * slot + i) % vocab_size for i in range(self._context)) for slot in range(self._rows)]
        return [NewSequence(slot, ids, len(ids), self._sampling, 0) for slot, ids in enumerate(tokens)]

    def run(self, num_steps: int) -> tuple[float, float]:
        """Seconds of a step, and those of them that the host took to launch it. As the engine does it: the next step
        is launched before the last one is collected, where that is of use."""
        ahead = self._runner.info.launches_ahead
        launching, began = 0.0, time.perf_counter()
        for step in range(num_steps):
            before = time.perf_counter()
            self.launch()
            launching += time.perf_counter() - before
            if step or not ahead:
                self._runner.collect()
        if ahead:
            self._runner.collect()
        return (time.perf_counter() - began) / num_steps, launching / num_steps

    def first_logprobs(self) -> TokenLogprobs | None:
        """One step; what the first row's token and the likeliest ones got."""
        self.launch()
        return self._runner.collect().logprobs[0]


def run(setting: Setting) -> Iterator[Row]:
    [prompt] = prompts(1, CHECKED_TOKENS, int(read_config(setting.model, tiny=setting.tiny).vocab_size), 4)
    stock = stock_logprobs(setting, prompt)
    gc.collect()  # there may not be room for two of the model
    served = serve(setting)
    runner = served.runner
    _fill_cache(runner)
    for mode in modes(runner):
        for rows in TINY_ROWS if setting.tiny else ROWS:
            yield from attempt(f"{mode}, {rows} rows", partial(_step, setting, served, mode, rows))
        yield from attempt(f"operations, {mode}", partial(_operations, setting, served, mode))
    yield from attempt("same bits", partial(_invariance, setting, runner))
    tolerance = TOLERANCE[setting.dtype]
    yield from attempt("off the stock forward", partial(_off_stock, served, prompt, stock, tolerance))
    if setting.is_cuda and _compiled(runner) is None:
        yield Row("compiled", None, "", note=f"failed: {'; '.join(served.said)}", failed=True)


@torch.inference_mode()
def _fill_cache(runner: PackedModelRunner) -> None:
    """With random numbers: zeros would take less power, and be read faster where power is the limit."""
    lane: Any = runner._lane
    for pool in lane._caches:
        pool.k.normal_()
        pool.v.normal_()


def modes(runner: PackedModelRunner) -> list[str]:
    """The ways in which a step can run here, the one that is served first."""
    return [
        *(["graph"] if runner._decode_steps is not None else []),
        *(["compiled"] if _compiled(runner) is not None else []),
        "eager",
    ]


def _compiled(runner: PackedModelRunner) -> CompiledParts | None:
    parts: CompiledParts | None = getattr(runner._lane, "compiled", None)
    return parts


@contextmanager
def running(runner: PackedModelRunner, mode: str) -> Iterator[None]:
    """While it lasts, steps run in this way: each leaves out what the one before it in ``modes`` adds."""
    steps, compiled = runner._decode_steps, _compiled(runner)
    if mode != "graph":
        runner._decode_steps = None
    try:
        with compiled.paused() if mode == "eager" and compiled is not None else nullcontext():
            yield
    finally:
        runner._decode_steps = steps


def _step(setting: Setting, served: Served, mode: str, rows: int) -> Iterator[Row]:
    context, num_steps = (TINY_CONTEXT, TINY_STEPS) if setting.tiny else (CONTEXT, STEPS)
    with running(served.runner, mode):
        decodes = Decodes(served.runner, rows, context)
        decodes.run(WARM_UPS)
        rounds = [decodes.run(num_steps) for _ in range(ROUNDS)]
    took, launching = (statistics.median(times) for times in zip(*rounds, strict=True))
    shortest = decode_step(served.size, rows, context + num_steps * ROUNDS / 2).seconds(setting.limits)
    note = f"{rows / took:.0f} tokens/s, the host takes {1e3 * launching:.2f} ms to launch it; {ROUNDS} rounds"
    yield Row.of_time(f"{mode}, {rows} rows", 1e3 * took, "ms", 1e3 * shortest if shortest else None, note)


def _operations(setting: Setting, served: Served, mode: str) -> Iterator[Row]:
    """Of a step, sampling and all; on a GPU those that take longest, too."""
    rows, context = (TINY_PROFILED_ROWS, TINY_CONTEXT) if setting.tiny else (PROFILED_ROWS, CONTEXT)
    with running(served.runner, mode):
        decodes = Decodes(served.runner, rows, context)
        decodes.run(WARM_UPS)
        found = count_operations(lambda: decodes.run(1), setting.device)
    num_layers = served.size.num_layers
    total = sum(each.count for each in found)
    what = "kernels" if setting.is_cuda else "dispatched operations"
    note = f"{total} {what} in a step of {rows} rows, over {num_layers} layers"
    yield Row(f"operations a step, {mode}", total / num_layers, "a layer", note=note)
    yield Row(f"operations in layers, {mode}", in_layers(found, num_layers), "a layer", note="the repeated ones alone")
    for each in found[:12] if setting.is_cuda else ():
        yield Row(f"{mode}: {each.name[:80]}", each.microseconds, "us a step", note=f"{each.count} times")


def _invariance(setting: Setting, runner: PackedModelRunner) -> Iterator[Row]:
    """Of the whole model, as it is served: a row beside others, and the same row alone."""
    context = TINY_CONTEXT if setting.tiny else CONTEXT
    alone = Decodes(runner, 1, context, WITH_LOGPROBS).first_logprobs()
    for rows in TINY_COMPANY if setting.tiny else COMPANY:
        same = Decodes(runner, rows, context, WITH_LOGPROBS).first_logprobs() == alone
        note = f"log-probabilities of {NUM_TOP} tokens"
        yield Row(f"same bits alone and among {rows}", float(same), "bits equal", note=note)


def stock_logprobs(setting: Setting, prompt: list[int]) -> Tensor:
    """Of each of a prompt's tokens but the first, by the model as transformers runs it."""
    model = make_model(setting.model, setting.device, setting.dtype, tiny=setting.tiny)
    ids = torch.tensor(prompt, device=setting.device)
    with torch.inference_mode():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        found: Tensor = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu()
    return found


def served_logprobs(served: Served, prompt: list[int]) -> Tensor:
    """The same by the engine."""
    core = served.engine()
    core.add_request(AddRequest("0", prompt, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)))
    found: list[float] = []
    while core.has_work:
        for output in core.step():
            found += [each.logprob for each in output.prompt_logprobs]
    return torch.tensor(found)


def _off_stock(served: Served, prompt: list[int], stock: Tensor, tolerance: float) -> Iterator[Row]:
    """What the self-check of a load looks for, here of random weights and seen from outside."""
    error = float((served_logprobs(served, prompt) - stock).abs().mean() / stock.std())
    if not math.isfinite(error):
        raise ValueError("numbers came out that are none")
    note = "mean difference; the limit is the self-check's"
    yield Row("off the stock forward", error, "of the spread", tolerance, note=note)
