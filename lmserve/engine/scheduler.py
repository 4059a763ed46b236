"""Who runs when.

There is no prefill phase and no decode phase. Each request has ``num_tokens`` and ``num_computed_tokens``, and every
step lets the latter catch up with the former under one budget of tokens:

1. running requests that lack one token (they decode), in the order of their rank (priority, arrival);
2. running requests that lack more (a prompt, or a history after a preemption), a chunk each;
3. waiting requests, while there are a slot, budget, and blocks for all their known tokens. One that lacks blocks holds
   up those behind it, so that small requests do not starve a large one. One whose next prefix block a running request
   is about to compute steps aside until it can share it; this is how the ``n`` choices of a request share its prompt.

The log-probabilities of prompts have a budget of their own, which cuts chunks too. In a step that has used it up those
who ask for them are not admitted, and others pass.

An admitted request has blocks for all its known tokens, so only decoding can run out of them. Then the running request
that is last in rank loses its blocks and goes back to its old place in the queue; its tokens are computed again later
(preemption by recompute, as in vLLM). The first in rank is never the victim of another, so somebody always gets on.

A request whose reader is slow is paused: it waits, holds nothing, and is passed by until it is resumed.

The vocabulary is that of vLLM's scheduler; chunked prefill is due to Sarathi-Serve (arXiv:2403.02310).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.request import Request, RequestStatus
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import NewSequence, RunnerInfo, ScheduledChunk, StepInput, StepOutput

MAX_PROMPT_LOGPROBS = 256
NO_TOKEN = "The model's output is not a number, or the request's own constraints leave no token to choose."

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of one engine. The length of the queue is not among them: the API process keeps it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    whole_images: bool = False
    """A chunk may not end inside an image, whose tokens see each other. An image that is longer than what is left of
    the budget is computed all the same."""
    prefix_caching: bool = True
    """Off, only the ``n`` choices of one request share blocks."""
    max_num_prompt_logprobs: int = MAX_PROMPT_LOGPROBS
    """Rows of logits that one step may compute for prompts. A row is as wide as the vocabulary, so a whole step of
    them would take gigabytes; without prompts' log-probabilities there is at most one for each sequence."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step, decided: ``requests[i]`` gets ``step.chunks[i]``."""

    requests: list[Request]
    step: StepInput


@dataclass(slots=True)
class _Budget:
    """What is left of a step."""

    num_tokens: int
    num_prompt_logprobs: int

    def take(self, chunk: ScheduledChunk) -> None:
        self.num_tokens -= chunk.num_tokens
        self.num_prompt_logprobs -= len(chunk.prompt_logprobs)


def max_request_tokens(info: RunnerInfo) -> int:
    """Tokens, prompt and output together, that one request may have: the context, or the whole KV cache if less."""
    return min(info.max_model_len, info.kv_cache_tokens)


class Scheduler:
    """Owns the queue and the running set, both in order of rank, and the slots."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self.kv = kv
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_paused = 0
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_num_prompt_logprobs = config.max_num_prompt_logprobs
        self._whole_images = config.whole_images
        self._max_tokens = min(config.max_model_len, kv.max_tokens)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._free_slots = list(reversed(range(config.max_num_seqs)))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) - self.num_paused

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queues a request. That it can fit at all has been checked."""
        insort(self._waiting, request, key=_rank)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step. Its tokens count as computed only once ``update`` hears of them."""
        decodes: list[tuple[Request, ScheduledChunk]] = []
        prefills: list[tuple[Request, ScheduledChunk]] = []
        new_sequences: list[NewSequence] = []
        budget = _Budget(self._max_num_batched_tokens, self._max_num_prompt_logprobs)
        for request in self._candidates(budget):
            if request.slot is None:
                self._take_slot(request)
                new_sequences.append(_new_sequence(request))
            chunk = self._chunk(request, budget)
            (decodes if chunk.samples and chunk.num_tokens == 1 else prefills).append((request, chunk))
            budget.take(chunk)
            if budget.num_tokens <= 0:
                break
        return _scheduler_output(decodes + prefills, new_sequences)

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[RequestOutput]:
        """Takes note of a computed step; its news."""
        outputs: list[RequestOutput] = []
        sampled = iter(zip(output.token_ids, output.logprobs, strict=True))
        scored = iter(output.prompt_logprobs)
        for request, chunk in zip(scheduled.requests, scheduled.step.chunks, strict=True):
            request.num_computed_tokens = chunk.start + chunk.num_tokens
            self.kv.register_computed(request, chunk.start)
            prompt_logprobs = tuple(islice(scored, len(chunk.prompt_logprobs)))
            request.num_prompt_logprobs += len(prompt_logprobs)
            news = None
            if chunk.samples:
                news = self._append(request, *next(sampled))
            elif request.num_computed_tokens == request.num_tokens:
                news = self.finish(request, FinishReason.LENGTH)  # max_tokens is 0
            if prompt_logprobs:
                news = replace(news or _output(request), prompt_logprobs=prompt_logprobs)
            if news is not None:
                outputs.append(news)
        return outputs

    def pause(self, request: Request) -> None:
        """Puts a request off until it is resumed. Others get its blocks and its slot; its place in the queue stays.

        What it had computed is found in the prefix cache again, or computed again.
        """
        if request.is_paused:
            return
        if request.status is RequestStatus.RUNNING:
            self._put_back(request)
        request.is_paused = True
        self.num_paused += 1

    def resume(self, request: Request) -> None:
        """Lets a paused request be served again."""
        if request.is_paused:
            request.is_paused = False
            self.num_paused -= 1

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        """Ends a request wherever it is, takes its blocks and slot back, and makes its last output."""
        self._end(request)
        return _output(request, reason=reason, error=error)

    def halve(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """The step without the later half of its requests, which go back to the queue.

        For a device that ran out of memory in this step. How far the runner came is unknown, so the requests that stay
        are told to it anew.
        """
        for request in sorted(scheduled.requests, key=_rank)[(len(scheduled.requests) + 1) // 2 :]:
            self._preempt(request)
        return self.remaining(scheduled)

    def remaining(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """The step without the requests that run no more. The runner is told the others anew."""
        pairs = zip(scheduled.requests, scheduled.step.chunks, strict=True)
        kept = [pair for pair in pairs if pair[0].status is RequestStatus.RUNNING]
        return _scheduler_output(kept, [_new_sequence(request) for request, _ in kept])

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` if a block or a slot was lost or given twice."""
        self.kv.check_integrity(self._running)
        slots = [request.slot for request in self._running if request.slot is not None]
        if sorted(slots + self._free_slots) != list(range(self._max_num_seqs)):
            raise IntegrityError(f"slots {slots} are used and {self._free_slots} free, of {self._max_num_seqs}")

    def _chunk(self, request: Request, budget: _Budget) -> ScheduledChunk:
        assert request.slot is not None
        start = request.num_computed_tokens
        end = start + _num_tokens(request, budget)
        if self._whole_images:
            end = request.end_of_whole_images(start, end)
        samples = end == request.num_tokens and request.sampling.max_tokens > 0
        unreported = request.unreported(start, end)
        return ScheduledChunk(request.slot, start, end - start, request.block_table, samples, unreported)

    def _candidates(self, budget: _Budget) -> Iterator[Request]:
        """Whom to serve in this step, best first. Lazy: nobody is preempted or admitted beyond the budget.

        ``budget`` is what those that came out before have left.
        """
        num_preemptions = self.num_preemptions
        prefills: list[Request] = []
        for request in list(self._running):
            if request.num_tokens - request.num_computed_tokens > 1:
                prefills.append(request)
            elif self._has_room(request):
                yield request
        for request in prefills:
            if request.status is RequestStatus.RUNNING:
                yield request
        if self.num_preemptions == num_preemptions:
            yield from self._admissible(budget)

    def _has_room(self, request: Request) -> bool:
        """A block for the newest token, if need be at the cost of the last in rank. False if that was this request."""
        while request.status is RequestStatus.RUNNING:
            if self.kv.grow(request):
                return True
            self._preempt(self._running[-1])
        return False

    def _admissible(self, budget: _Budget) -> Iterator[Request]:
        """Waiting requests that start now; they have their blocks when they come out, and no slot yet."""
        for request in list(self._waiting):
            if not self._free_slots:
                return
            if request.is_paused or self.kv.prefix_is_pending(request):
                continue
            if request.sampling.prompt_logprobs is not None and budget.num_prompt_logprobs == 0:
                continue  # all its choices: the others would compute the prompt that the first is to compute
            if not self.kv.admit(request, num_spare=len(self._running)):
                return
            yield request

    def _take_slot(self, request: Request) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=_rank)
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        self.num_cached_tokens += request.num_computed_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        if token_id < 0:
            return replace(self.finish(request, FinishReason.ERROR, NO_TOKEN), may_retry=False)
        request.output_token_ids.append(token_id)
        reason = self._finish_reason(request, token_id)
        if reason is not None:
            self._end(request)
        return _output(request, (token_id,), () if logprobs is None else (logprobs,), reason)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        num_output, sampling = len(request.output_token_ids), request.sampling
        if token_id in request.end_token_ids and num_output > sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= sampling.max_tokens or request.num_tokens >= self._max_tokens:
            return FinishReason.LENGTH
        return None

    def _end(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
        else:
            self._waiting.remove(request)
            self.resume(request)
        request.status = RequestStatus.FINISHED

    def _preempt(self, request: Request) -> None:
        self._put_back(request)
        self.num_preemptions += 1

    def _put_back(self, request: Request) -> None:
        self._stop_running(request)
        request.status = RequestStatus.WAITING
        self.add(request)

    def _stop_running(self, request: Request) -> None:
        assert request.slot is not None
        self._running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = None
        self.kv.free(request)


def _num_tokens(request: Request, budget: _Budget) -> int:
    """How many tokens of a request the budget lets be computed: at least one.

    Rows of logits are left for whoever needs one: of the running requests only the last that was admitted can still
    have prompt tokens to report, and it is served before any other is admitted.
    """
    start = request.num_computed_tokens
    num_tokens = min(budget.num_tokens, request.num_tokens - start)
    unreported = request.unreported(start, start + num_tokens)
    if len(unreported) > budget.num_prompt_logprobs:
        return unreported[budget.num_prompt_logprobs] - start
    return num_tokens


def _new_sequence(request: Request) -> NewSequence:
    assert request.slot is not None
    return NewSequence(
        request.slot,
        tuple(request.token_ids(0, request.num_tokens)),
        request.num_prompt_tokens,
        request.sampling,
        request.choice,
        request.eos_token_ids,
        request.images,
        request.grammar,
    )


def _scheduler_output(pairs: list[tuple[Request, ScheduledChunk]], new_sequences: list[NewSequence]) -> SchedulerOutput:
    chunks = [chunk for _, chunk in pairs]
    return SchedulerOutput([request for request, _ in pairs], StepInput(chunks, new_sequences))


def _output(
    request: Request,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestOutput:
    num_cached = request.num_cached_tokens or 0
    return RequestOutput(request.request_id, request.choice, token_ids, logprobs, num_cached, reason, error)
