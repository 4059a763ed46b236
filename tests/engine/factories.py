"""Small real parts for the tests of the engine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.engine.request import Request
from lmserve.engine.scheduler import MAX_PROMPT_LOGPROBS, SchedulerConfig
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import PromptImage, RunnerInfo
from lmserve.sampling_params import SamplingParams
from tests.engine.fake_runner import EOS, FakeRunner, digest, next_token, prompt_digests, prompt_logprob


def make_request(
    num_tokens: int = 8,
    *,
    name: str = "r",
    arrival: int = 0,
    priority: int = 0,
    first_token: int = 0,
    sampling: SamplingParams | None = None,
    images: tuple[PromptImage, ...] = (),
) -> Request:
    """A request whose prompt counts up from ``first_token``: equal ``first_token``, equal beginning."""
    return Request(
        request_id=name,
        choice=0,
        prompt_token_ids=[(first_token + i) % 50 for i in range(num_tokens)],
        sampling=sampling or SamplingParams(max_tokens=8),
        eos_token_ids=(EOS,),
        priority=priority,
        arrival=arrival,
        images=images,
    )


def make_config(
    info: RunnerInfo,
    *,
    prefix_caching: bool = True,
    max_num_prompt_logprobs: int = MAX_PROMPT_LOGPROBS,
    mixed_step_factor: float = math.inf,
) -> SchedulerConfig:
    """The limits that the runner names."""
    return SchedulerConfig(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        whole_images=info.images == "whole",
        whole_prompts=info.whole_prompts,
        prefix_caching=prefix_caching,
        max_num_prompt_logprobs=max_num_prompt_logprobs,
        mixed_step_factor=mixed_step_factor,
    )


def make_engine(
    runner: FakeRunner, *, prefix_caching: bool = True, clock: Callable[[], float] = lambda: 0.0
) -> EngineCore:
    """An engine around a fake runner. Its clock stands still."""
    return EngineCore(runner, make_config(runner.info, prefix_caching=prefix_caching), clock)


class Results:
    """What became of each choice of each request, put together from the outputs."""

    def __init__(self) -> None:
        self.token_ids: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.prompt_logprobs: defaultdict[tuple[str, int], list[TokenLogprobs]] = defaultdict(list)
        self.ends: dict[tuple[str, int], RequestOutput] = {}

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            key = (output.request_id, output.choice)
            assert key not in self.ends, f"news of {key} after its end"
            self.token_ids[key] += output.token_ids
            self.prompt_logprobs[key] += output.prompt_logprobs
            if output.finish_reason is not None:
                self.ends[key] = output


def run_to_end(engine: EngineCore, *, max_steps: int = 5_000) -> Results:
    """Steps until there is nothing to do, checking the books each time."""
    results = Results()
    for _ in range(max_steps):
        if not engine.has_work:
            return results
        results.take(engine.step())
        engine.check_integrity()
    raise AssertionError(f"not done after {max_steps} steps")


def expected_prompt_logprobs(message: AddRequest, choice: int) -> list[TokenLogprobs]:
    """What a choice gets for its prompt: one entry for each token but the first, if it is the one that reports them."""
    if message.sampling.prompt_logprobs is None or choice > 0:
        return []
    return [prompt_logprob(prefix) for prefix in prompt_digests(message.prompt_token_ids, message.images)[2:]]


def expected_output(message: AddRequest, choice: int, limit: int) -> tuple[list[int], FinishReason]:
    """What a choice gets, worked out the obvious way: one sequence, no cache. ``limit``: prompt and output together."""
    sampling = message.sampling
    eos = () if sampling.ignore_eos else tuple(message.eos_token_ids)
    held_back = frozenset((*sampling.stop_token_ids, *message.eos_token_ids))
    prefix = prompt_digests(message.prompt_token_ids, message.images)[-1]
    output: list[int] = []
    while len(output) < sampling.max_tokens and len(message.prompt_token_ids) + len(output) < limit:
        token_id = next_token(prefix, sampling, choice, held_back, len(output))
        output.append(token_id)
        if token_id in (*sampling.stop_token_ids, *eos) and len(output) > sampling.min_tokens:
            return output, FinishReason.STOP
        prefix = digest(prefix, token_id)
    return output, FinishReason.LENGTH
