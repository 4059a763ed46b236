"""Who runs when.

There is no prefill phase and no decode phase. Each request has ``num_tokens`` and ``num_computed_tokens``, and every
step lets the latter catch up with the former under one token budget:

1. running requests that lack one token (they decode), in the order of (priority, arrival);
2. running requests that lack more (prompts, or a history after a preemption), a chunk each;
3. waiting requests, as long as a slot, budget, and blocks for all their known tokens can be had. One that lacks blocks
   holds up those behind it, so that a large request is not starved by small ones; one whose next prefix block a running
   request is just computing steps aside for it. The ``n`` choices of a request share their prompt that way.

Because an admitted request has blocks for all its known tokens, only decoding can run out of them. Then the running
request that is last in (priority, arrival) loses its blocks and goes back to its old place in the queue; its tokens
are computed again later (preemption by recompute, as in vLLM). The first in that order is never preempted, so
everybody ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.request import Request, RequestStatus
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import NewSequence, RunnerInfo, ScheduledChunk, StepInput, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of one engine."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step, decided: the requests beside the chunks they got."""

    requests: list[Request]
    step: StepInput


def max_request_tokens(info: RunnerInfo) -> int:
    """Tokens, prompt and output, that one sequence may have: the model's limit or the whole KV cache."""
    return min(info.max_model_len, info.kv_cache_tokens)


class Scheduler:
    """Owns the queue and the running set, both in the order of (priority, arrival), and the slots."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self.config = config
        self.kv = kv
        self.num_preemptions = 0
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._free_slots = list(range(config.max_num_seqs))[::-1]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        """Queues a request that is known to fit."""
        insort(self._waiting, request, key=_rank)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step. Its tokens count as computed only when ``update`` hears of them."""
        requests: list[Request] = []
        chunks: list[ScheduledChunk] = []
        new_sequences: list[NewSequence] = []
        budget = self.config.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        for request in self._catching_up():
            if budget == 0:
                break
            chunk = _chunk(request, budget)
            budget -= chunk.num_tokens
            requests.append(request)
            chunks.append(chunk)
        if budget > 0 and self.num_preemptions == num_preemptions:
            for request in self._admit():
                chunk = _chunk(request, budget)
                budget -= chunk.num_tokens
                requests.append(request)
                chunks.append(chunk)
                new_sequences.append(_new_sequence(request))
                if budget == 0:
                    break
        return SchedulerOutput(requests, StepInput(chunks, new_sequences))

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[RequestOutput]:
        """Takes note of a step that was computed; the news of it."""
        news = []
        sampled = iter(zip(output.token_ids, output.logprobs, strict=True))
        for request, chunk in zip(scheduled.requests, scheduled.step.chunks, strict=True):
            request.num_computed_tokens = chunk.start + chunk.num_tokens
            self.kv.register_computed(request, chunk.start)
            if chunk.samples:
                token_id, logprobs = next(sampled)
                news.append(self._append(request, token_id, logprobs))
            elif request.num_computed_tokens == request.num_tokens:  # max_tokens is 0: only the prompt was wanted
                news.append(self.finish(request, FinishReason.LENGTH))
        return news

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        """Ends a request, wherever it is, and takes its blocks and slot back; its last output."""
        self._remove(request)
        request.status = RequestStatus.FINISHED
        return _output(request, reason, error=error)

    def halve(self, scheduled: SchedulerOutput) -> SchedulerOutput:
        """The step without the later half of the running requests, which go back to the queue.

        For a device that ran out of memory in this step.
        """
        for request in self._running[(len(self._running) + 1) // 2 :]:
            self._preempt(request)
        kept = [
            (request, chunk)
            for request, chunk in zip(scheduled.requests, scheduled.step.chunks, strict=True)
            if request.status is RequestStatus.RUNNING
        ]
        slots = {chunk.slot for _, chunk in kept}
        new_sequences = [new for new in scheduled.step.new_sequences if new.slot in slots]
        return SchedulerOutput([request for request, _ in kept], StepInput([c for _, c in kept], new_sequences))

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks or slots were lost."""
        self.kv.check_integrity(self._running)
        slots = [request.slot for request in self._running]
        assert len(set(slots)) == len(slots)
        assert len(slots) + len(self._free_slots) == self.config.max_num_seqs, "a slot is lost"

    def _catching_up(self) -> Iterator[Request]:
        """Running requests with work to do, decodes first. Those who find no block for their newest token preempt."""
        lacking_more = []
        for request in list(self._running):
            if request.num_tokens - request.num_computed_tokens > 1:
                lacking_more.append(request)
            elif self._has_room(request):
                yield request
        yield from (request for request in lacking_more if request.status is RequestStatus.RUNNING)

    def _has_room(self, request: Request) -> bool:
        """A block for the newest token, if need be by preemption; False if the request itself had to go."""
        while request.status is RequestStatus.RUNNING:
            if self.kv.grow(request):
                return True
            self._preempt(self._running[-1])
        return False

    def _admit(self) -> Iterator[Request]:
        """Waiting requests that may start now, already admitted. Lazy: only those whom the caller takes."""
        for request in list(self._waiting):
            if not self._free_slots:
                return
            if self.kv.is_being_computed(request):
                continue
            if not self.kv.admit(request):
                return
            self._waiting.remove(request)
            request.slot = self._free_slots.pop()
            request.status = RequestStatus.RUNNING
            if not request.was_admitted:
                request.was_admitted = True
                request.num_cached_tokens = request.num_computed_tokens
            insort(self._running, request, key=_rank)
            yield request

    def _append(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        if token_id < 0:
            return self.finish(request, FinishReason.ERROR, "The model's output holds no usable token (not a number).")
        request.token_ids.append(token_id)
        reason = self._finish_reason(request, token_id)
        if reason is not None:
            self._remove(request)
            request.status = RequestStatus.FINISHED
        return _output(request, reason, (token_id,), () if logprobs is None else (logprobs,))

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        if token_id in request.stop_token_ids and request.num_output_tokens >= request.sampling.min_tokens:
            return FinishReason.STOP
        if request.num_output_tokens >= request.sampling.max_tokens or request.num_tokens >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _preempt(self, request: Request) -> None:
        self._remove(request)
        request.status = RequestStatus.WAITING
        self.num_preemptions += 1
        self.add(request)

    def _remove(self, request: Request) -> None:
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self.kv.free(request)
        assert request.slot is not None
        self._free_slots.append(request.slot)
        request.slot = None


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _chunk(request: Request, budget: int) -> ScheduledChunk:
    assert request.slot is not None
    start = request.num_computed_tokens
    num_tokens = min(budget, request.num_tokens - start)
    samples = start + num_tokens == request.num_tokens and request.sampling.max_tokens > 0
    return ScheduledChunk(request.slot, start, num_tokens, request.block_table, samples)


def _new_sequence(request: Request) -> NewSequence:
    assert request.slot is not None
    return NewSequence(
        request.slot,
        tuple(request.token_ids),
        len(request.prompt_token_ids),
        request.sampling,
        request.choice,
        request.eos_token_ids,
    )


def _output(
    request: Request,
    reason: FinishReason | None,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    error: str | None = None,
) -> RequestOutput:
    return RequestOutput(
        request.request_id, request.choice, token_ids, logprobs, request.num_cached_tokens, reason, error
    )
