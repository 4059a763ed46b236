"""Requests through the engine, in this process: what a server does but for the network and the text."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass

from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Cancel
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.sampling_params import SamplingParams

ENDLESS = 100_000
"""Tokens: nobody ends while it is measured."""


@dataclass(frozen=True, slots=True)
class Run:
    """What streams got."""

    tokens_per_second: float
    context: float
    """Tokens that a stream had behind it, on average."""
    first_token_seconds: float = 0.0
    """From the request on, the median."""


class RequestFailed(Exception):
    """A request ended with an error, whose words are the message."""


def prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random tokens: no two prompts begin alike, so that no prefix is reused."""
    generator = random.Random(f"{seed} {count} {length}")
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def decode(core: EngineCore, asked: list[list[int]], *, num_steps: int, num_warm_ups: int) -> Run:
    """How fast all streams get on together while each of them decodes and no prompt is read."""
    _add(core, asked, ENDLESS)
    lengths = {str(i): len(prompt) for i, prompt in enumerate(asked)}
    decoding: set[str] = set()
    while len(decoding) < len(asked):
        decoding |= {output.request_id for output in _step(core, lengths)}
    for _ in range(num_warm_ups):
        _step(core, lengths)
    before, began = sum(lengths.values()), time.perf_counter()
    for _ in range(num_steps):
        _step(core, lengths)
    took, after = time.perf_counter() - began, sum(lengths.values())
    for request_id in lengths:
        core.cancel(Cancel(request_id))
    while core.has_work:
        core.step()
    return Run((after - before) / took, (before + after) / 2 / len(asked))


def whole(core: EngineCore, asked: list[list[int]], num_tokens: int) -> Run:
    """All requests at once, from the first to the last token of each. The rate is of output tokens."""
    began = time.perf_counter()
    _add(core, asked, num_tokens)
    lengths = {str(i): len(prompt) for i, prompt in enumerate(asked)}
    first: dict[str, float] = {}
    while core.has_work:
        for output in _step(core, lengths):
            first.setdefault(output.request_id, time.perf_counter() - began)
    took = time.perf_counter() - began
    num_generated = sum(lengths.values()) - sum(map(len, asked))
    if num_generated != len(asked) * num_tokens:
        raise RequestFailed(f"{num_generated} tokens came, and {len(asked) * num_tokens} were asked for")
    context = statistics.mean(map(len, asked)) + num_tokens / 2
    return Run(num_generated / took, context, statistics.median(first.values()))


def _add(core: EngineCore, asked: list[list[int]], num_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(asked):
        for refused in core.add_request(AddRequest(str(number), prompt, sampling)):
            raise RequestFailed(refused.error)


def _step(core: EngineCore, lengths: dict[str, int]) -> list[RequestOutput]:
    """The news of the streams that got tokens; their lengths grow."""
    outputs = core.step()
    for output in outputs:
        if output.finish_reason is FinishReason.ERROR:
            raise RequestFailed(output.error)
        lengths[output.request_id] += len(output.token_ids)
    return [output for output in outputs if output.token_ids]
