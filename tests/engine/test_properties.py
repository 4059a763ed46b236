"""Random lives of the engine: arrivals, cancels, faults, pools too small. Each request gets what it gets alone.

The fake runner checks what it is told to do, ``WatchedScheduler`` who gets it, and ``live`` what comes out.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import AddRequest, Cancel, Pause, Resume
from lmserve.engine.pace import Pace
from lmserve.engine.request import Request, RequestStatus
from lmserve.engine.scheduler import LONG_SHARE, MAX_HOLD_UPS, Scheduler, SchedulerConfig, max_request_tokens
from lmserve.engine.step_draft import SchedulerOutput
from lmserve.outputs import FinishReason
from lmserve.runtime.interface import ImageReading, PromptImage, RunnerInfo, SequenceFailed
from lmserve.sampling_params import SamplingParams
from tests.engine.factories import Results, expected_output, expected_prompt_logprobs, make_config, make_engine
from tests.engine.fake_runner import EOS, VOCAB_SIZE, FakeRunner, Faults, Moment, OutOfMemoryError, make_info

MAX_STEPS_PER_REQUEST = 200
_rank = attrgetter("rank")
READINGS = get_args(ImageReading)
STATES = ("none", "saved", "whole")
"""Of recurrent layers: there are none; they are saved; the model does not even go on from one with a chunk."""


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """The engine logs a trace for each fault, which would take longer than all the rest."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class WatchedPace(Pace):
    """Remembers what it has said."""

    num_rows = allowed = 0

    def allowance(self, num_rows: int, num_prompts: int, token_work: float = 1.0) -> int:
        self.num_rows, self.allowed = num_rows, super().allowance(num_rows, num_prompts, token_work)
        return self.allowed


class WatchedScheduler(Scheduler):
    """A scheduler that looks over its own shoulder."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        super().__init__(config, kv)
        self.pace = self.watched_pace = WatchedPace(config.mixed_step_factor, config.max_num_batched_tokens)
        self._holds_up = False

    @property
    def _num_for_prompts(self) -> int:
        """Tokens that the last step had for prompts."""
        pace, left = self.watched_pace, self._config.max_num_batched_tokens - self.watched_pace.num_rows
        return max(0, left if self._holds_up else min(pace.allowed, left))

    def _may_hold_up(self, decoding: list[Request], first: Request, allowance: int) -> bool:
        self._holds_up = super()._may_hold_up(decoding, first, allowance)
        return self._holds_up

    def schedule(self) -> SchedulerOutput:
        self._holds_up = False
        before = list(self._running)
        long = [request for request in sorted([*before, *self._waiting], key=_rank) if self._is_long(request)]
        scheduled = super().schedule()
        kept = [request for request in before if request.status is RequestStatus.RUNNING]
        preempted = [request for request in before if request.status is not RequestStatus.RUNNING]
        assert kept[:1] == before[:1], "the first in rank is never preempted"
        _assert_order(kept, preempted)
        num_rows = sum(len(chunk.prompt_logprobs) for chunk in scheduled.step.chunks)
        scoring = [chunk for chunk in scheduled.step.chunks if chunk.prompt_logprobs]
        is_whole = self._config.whole_prompts
        assert num_rows <= self._config.max_num_prompt_logprobs or (is_whole and len(scoring) == 1)
        no_rows_left = num_rows >= self._config.max_num_prompt_logprobs
        started = [request for request in self._running if request not in before]
        assert not (preempted and started), "who starts is not what others had to go for"
        for request in self._waiting:
            if any(request.rank < other.rank for other in started):
                lacks_rows = no_rows_left and request.sampling.prompt_logprobs is not None
                may_be_passed = request.is_paused or lacks_rows or self.kv.prefix_is_pending(request) or is_whole
                assert may_be_passed or self._has_a_long_one_before(request, long, scheduled), "passed for no reason"
        assert not any(request.is_paused for request in self._running)
        assert all(request.num_hold_ups <= MAX_HOLD_UPS for request in self._running)
        num_prompt_tokens = scheduled.step.num_tokens - self.watched_pace.num_rows
        if num_prompt_tokens < self._num_for_prompts:
            owed = [request.num_prompt_logprobs < request.num_prompt_logprobs_wanted for request in self._running]
            lacking = zip(self._running, owed, strict=True)
            served = {r for r, owes in lacking if r.num_left and not (owes and no_rows_left)}
            if not self._config.whole_prompts or not set(scheduled.requests) & served:
                assert served <= set(scheduled.requests), "budget is left, and somebody gets nothing"
        elif num_prompt_tokens > self._num_for_prompts:
            assert self._config.whole_images or self._config.whole_prompts, "more than a mixed step may read"
            assert num_prompt_tokens - scheduled.step.chunks[-1].num_tokens < self._num_for_prompts
        in_flight = any(r.num_steps_in_flight for r in [*self._running, *self._waiting])
        assert scheduled.requests or in_flight or not (self._running or self.num_waiting), "nobody gets on"
        self._check_the_first_reader(scheduled)
        return scheduled

    def _has_a_long_one_before(self, request: Request, long: list[Request], scheduled: SchedulerOutput) -> bool:
        """A long prompt may be passed by short ones while an older one of its level has the share of the long."""
        if request not in long:
            return False
        older = [r for r in long[: long.index(request)] if r.priority == request.priority]
        return any(r in scheduled.requests for r in older)

    def _check_the_first_reader(self, scheduled: SchedulerOutput) -> None:
        """Whatever comes after it, it gets its share of what the decodes have left."""
        pairs = list(zip(scheduled.requests, scheduled.step.chunks, strict=True))
        new = {sequence.slot for sequence in scheduled.step.new_sequences}
        readers = [r for r in self._running if r.num_left > 1 or r.slot in new]
        if not readers or not self._num_for_prompts:
            return
        first = readers[0]
        [chunk] = [chunk for request, chunk in pairs if request is first]
        due = min(first.num_left, max(1, self._num_for_prompts // LONG_SHARE))
        due = first.num_left if self._config.whole_prompts else due
        cut = bool(first.images) or len(chunk.prompt_logprobs) == self._config.max_num_prompt_logprobs
        assert chunk.num_tokens >= due or cut

    def halve(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        fewer = super().halve(scheduled)
        _assert_order(fewer.requests, [r for r in scheduled.requests if r not in fewer.requests])
        assert len(fewer.requests) == -(-len(scheduled.requests) // 2)
        return fewer


def _assert_order(kept: list[Request], preempted: list[Request]) -> None:
    assert not preempted or max(r.rank for r in kept) < min(r.rank for r in preempted)


def make_messages(rng: random.Random, count: int, info: RunnerInfo) -> list[AddRequest]:
    """Requests that fit. Many begin alike, because what they share is what can go wrong."""
    limit = max_request_tokens(info)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(limit)] for _ in range(3)]
    places = make_places(rng, limit)
    messages = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.randint(0, limit - 1)]
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 3))]
        prompt = (stem + tail)[: limit - 1] or [0]
        images = [] if info.images == "none" else make_images(rng, places, len(prompt))
        max_tokens = rng.randint(0, 20)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            seed=rng.randint(0, 3),
            n=rng.choice((1, 1, 1, 2, 4)),
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.2 else 0,
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=(rng.randrange(VOCAB_SIZE),) if rng.random() < 0.2 else (),
            prompt_logprobs=None if images else rng.choice((None, None, 0, 5)),
        )
        messages.append(AddRequest(str(i), prompt, sampling, [EOS], rng.choice((0, 0, 0, -1, 1)), images))
    return messages


def make_places(rng: random.Random, limit: int) -> list[tuple[int, int]]:
    """Where images may stand, some side by side."""
    edges = sorted(rng.sample(range(limit + 1), min(limit, 7)))
    return [place for place in pairwise(edges) if rng.random() < 0.7]


def make_images(rng: random.Random, places: list[tuple[int, int]], num_tokens: int) -> list[PromptImage]:
    """One of two in each place that the prompt has, or none."""
    chosen = [(start, end, rng.choice(("a", "a", "b", ""))) for start, end in places if end <= num_tokens]
    return [PromptImage(start, end, content, "") for start, end, content in chosen if content]


def make_faults(rng: random.Random, count: int) -> Faults:
    moments: tuple[Moment, ...] = ("launch", "written", "collect")
    errors = (RuntimeError(), OutOfMemoryError(), MemoryError(), SequenceFailed(rng.randint(0, 4)))
    return {rng.randint(0, 100): (rng.choice(moments), rng.choice(errors)) for _ in range(count)}


def live(rng: random.Random, info: RunnerInfo, num_requests: int, faults: Faults, *, prefix_caching: bool) -> int:
    """One life, from the first request to the last answer. Returns the number of preemptions."""
    ticks = accumulate(iter(lambda: rng.choice((0.0, 0.1, 0.2, rng.expovariate(1))), None))
    engine = make_engine(FakeRunner(info, faults), prefix_caching=prefix_caching, clock=lambda: next(ticks))
    config = make_config(
        info,
        prefix_caching=prefix_caching,
        max_num_prompt_logprobs=rng.randint(1, 40),
        mixed_step_factor=rng.choice((1.0, 1.5, 3.0, math.inf)),
    )
    engine.scheduler = WatchedScheduler(config, engine.scheduler.kv)
    messages = make_messages(rng, num_requests, info)
    results, cancelled, num_sent = Results(), set(), 0
    paused: list[str] = []
    busy = rng.uniform(0.3, 0.9)
    for _ in range(MAX_STEPS_PER_REQUEST * num_requests):
        while num_sent < len(messages) and (not engine.has_work or rng.random() < busy):
            assert engine.add_request(messages[num_sent]) == []
            num_sent += 1
        if num_sent and rng.random() < 0.05:
            victim = Cancel(str(rng.randrange(num_sent)), rng.choice((None, None, 0, 1)))
            results.take(outputs := engine.cancel(victim))
            cancelled |= {(output.request_id, output.choice) for output in outputs}
            engine.check_integrity()
        if num_sent and rng.random() < 0.1:
            paused.append(str(rng.randrange(num_sent)))
            engine.pause(Pause(paused[-1]))
            engine.check_integrity()
        if paused and (not engine.has_work or rng.random() < 0.2):
            engine.resume(Resume(paused.pop(rng.randrange(len(paused)))))
        results.take(engine.step())
        engine.check_integrity()
        if num_sent == len(messages) and not (engine.has_work or paused):
            break
    check_results(results, messages, cancelled, max_request_tokens(info), may_fail=bool(faults))
    assert engine.stats.num_free_blocks == info.num_blocks
    return engine.stats.num_preemptions


def check_results(
    results: Results, messages: list[AddRequest], cancelled: set[tuple[str, int]], limit: int, *, may_fail: bool
) -> None:
    """Everybody has ended, with all that is due, or with the beginning of it if cancelled or failed."""
    for sent in messages:
        for choice in range(sent.sampling.n):
            key = (sent.request_id, choice)
            tokens, reason = expected_output(sent, choice, limit)
            got, end = results.token_ids[key], results.ends[key]
            scored, all_scored = results.prompt_logprobs[key], expected_prompt_logprobs(sent, choice)
            assert (end.finish_reason is FinishReason.ABORT) == (key in cancelled)
            if end.finish_reason is FinishReason.ERROR:
                assert may_fail
            if end.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert got == tokens[: len(got)]
                assert scored == all_scored[: len(scored)]
            else:
                assert (got, end.finish_reason) == (tokens, reason)
                assert scored == all_scored


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(READINGS),
    st.booleans(),
    st.sampled_from(STATES),
)
def test_small_lives(
    rng: random.Random,
    num_requests: int,
    prefix_caching: bool,
    num_faults: int,
    images: ImageReading,
    ahead: bool,
    states: str,
) -> None:
    """Short enough to be read when hypothesis has found one that fails."""
    info = make_info(
        num_blocks=rng.randint(2, 16),
        block_size=rng.choice((1, 2, 4)),
        max_model_len=rng.randint(2, 30),
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.randint(1, 20),
        images=images,
        launches_ahead=ahead,
        num_saved_states=None if states == "none" else 0 if states == "whole" else rng.randint(0, 4),
        whole_prompts=states == "whole",
    )
    live(rng, info, num_requests, make_faults(rng, num_faults), prefix_caching=prefix_caching)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_faults", [0, 12])
@pytest.mark.parametrize("images", READINGS)
@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("seed", range(9))
def test_long_lives(seed: int, ahead: bool, images: ImageReading, num_faults: int, prefix_caching: bool) -> None:
    rng, states = random.Random(seed), STATES[seed % len(STATES)]
    info = make_info(
        num_blocks=rng.randint(12, 30),
        block_size=rng.choice((2, 4)),
        max_model_len=40,
        max_num_seqs=rng.randint(6, 16),
        max_num_batched_tokens=rng.randint(8, 48),
        images=images,
        launches_ahead=ahead,
        num_saved_states=None if states == "none" else 0 if states == "whole" else rng.randint(1, 12),
        whole_prompts=states == "whole",
    )
    assert live(rng, info, 150, make_faults(rng, num_faults), prefix_caching=prefix_caching) > 0, "it was too easy"
