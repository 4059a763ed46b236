"""Who runs when.

There is no prefill phase and no decode phase. Each request has ``num_tokens`` and ``num_computed_tokens``, and every
step lets the latter catch up with the former under one budget of tokens:

1. running requests that lack one token (they decode), in the order of their rank (priority, arrival);
2. requests that lack more (a prompt, or a history after a preemption), running and waiting ones in one order of rank, a
   chunk each. Where others decode, all chunks together are bounded, so that decoding goes on evenly (``pace.py``).
   But a prompt that two full steps would read gets them, until each who decodes has been held up four times: that is
   too seldom to make a stream uneven, and in small chunks a prompt has all weights read for little, again and again.

Of equal priority it is first come first served, but for one thing: a *long* prompt, one that has more left than three
quarters of a full step, gets a quarter of what the step has for prompts, and more only when those who came after it
have been served. So a short prompt never waits for a long one to end, nor does a long one starve. At its end a long
prompt is a short one, the oldest. (As with vLLM's ``max_long_partial_prefills`` and ``long_prefill_token_threshold``
the long are served one by one; but they leave nothing unused, and keep their place in the queue. A share for each class
instead of a virtual clock, as in fair queueing, arXiv:2401.00588, because there are but two classes.)

A waiting request starts if there are a slot and blocks for all its known tokens. One that lacks them when its turn has
come holds up those behind it, so that small requests do not starve a large one. One whose next prefix block a running
request is about to compute steps aside until it can share it; this is how the ``n`` choices of a request share its
prompt.

The log-probabilities of prompts have a budget of their own, which cuts chunks too. In a step that has used it up those
who ask for them are not admitted, and others pass.

An admitted request has blocks for all its known tokens, so only decoding can run out of them. Then the running request
that is last in rank loses its blocks and goes back to its old place in the queue; its tokens are computed again later
(preemption by recompute, as in vLLM). The first in rank is never the victim of another, so somebody always gets on.

A request whose reader is slow is paused: it waits, holds nothing, and is passed by until it is resumed.

The vocabulary is that of vLLM's scheduler; chunked prefill, and decodes that no prompt stalls, are due to Sarathi-Serve
(arXiv:2403.02310).
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, replace
from heapq import merge
from itertools import groupby, islice
from operator import attrgetter

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.pace import Pace
from lmserve.engine.request import Request, RequestStatus
from lmserve.engine.step_draft import SchedulerOutput, StepDraft, is_current, new_sequence
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import RunnerInfo, StepOutput

MAX_PROMPT_LOGPROBS = 256
LONG_SHARE = 4
"""A long prompt leaves all but the fourth part of a step to those who come after it."""
SOON = 2
"""Full steps that a prompt may take for which those who decode are held up."""
MAX_HOLD_UPS = 4
"""Steps of full length that one who decodes waits for, in all, for others' prompts."""
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
    whole_prompts: bool = False
    """A prompt is one chunk. One that is longer than the budget is computed all the same, alone among prompts."""
    prefix_caching: bool = True
    """Off, only the ``n`` choices of one request share blocks."""
    mixed_step_factor: float = math.inf
    """So many times as long as a decode step one may take that also reads prompts (``Pace``)."""
    context_cost: float = 0.0
    """What a token of context adds to what computing a token takes, as a part of what it takes without context."""
    max_num_prompt_logprobs: int = MAX_PROMPT_LOGPROBS
    """Rows of logits that one step may compute for prompts. A row is as wide as the vocabulary, so a whole step of
    them would take gigabytes; without prompts' log-probabilities there is at most one for each sequence."""


def max_request_tokens(info: RunnerInfo) -> int:
    """Tokens, prompt and output together, that one request may have: the context, or the whole KV cache if less."""
    return min(info.max_model_len, info.kv_cache_tokens)


class Scheduler:
    """Owns the queue and the running set, both in order of rank, and the slots."""

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager) -> None:
        self.kv = kv
        self.pace = Pace(config.mixed_step_factor, config.max_num_batched_tokens, config.context_cost)
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_paused = 0
        self._config = config
        self._max_num_short_tokens = config.max_num_batched_tokens - config.max_num_batched_tokens // LONG_SHARE
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
        """Decides the next step. Its tokens count as computed only once ``update`` hears of them.

        The step before may still be on its way, if ``advance`` has been told of it.
        """
        limits = self._config
        draft = StepDraft(
            limits.max_num_batched_tokens, limits.max_num_prompt_logprobs, limits.whole_images, limits.whole_prompts
        )
        self._decode(draft)
        decoding = list(draft.chunks)
        allowance = self._limit_prompts(decoding, draft)
        num_left = draft.num_tokens
        if not draft.is_full:
            self._read_prompts(draft)
        if allowance < num_left and allowance < num_left - draft.num_tokens:
            for request in decoding:
                request.num_hold_ups += 1
        return draft.finish(self.kv.with_saves)

    def advance(self, scheduled: SchedulerOutput) -> None:
        """The step is on its way, and the next one is decided before ``update`` (or ``lose``) hears of it.

        A sequence whose length alone will end it has no part in the next one.
        """
        for request, chunk in scheduled.pairs:
            request.num_steps_in_flight += 1
            request.num_launched_tokens = chunk.start + chunk.num_tokens
            if chunk.samples and not self._is_full(request, request.num_coming_tokens + 1):
                request.num_coming_tokens += 1

    def lose(self, scheduled: SchedulerOutput) -> list[Request]:
        """A step that was on its way has failed; those who lack what it computed. The others never needed it."""
        for request, chunk in scheduled.pairs:
            request.land(chunk.samples)
        return [request for request, chunk in scheduled.pairs if is_current(request, chunk)]

    def update(self, scheduled: SchedulerOutput, output: StepOutput) -> list[RequestOutput]:
        """Takes note of a computed step; its news.

        A request that has ended since gets nothing more. One that went back to the queue has its token, and will
        compute again what it has lost.
        """
        outputs: list[RequestOutput] = []
        sampled = iter(zip(output.token_ids, output.logprobs, strict=True))
        scored = iter(output.prompt_logprobs)
        for request, chunk in scheduled.pairs:
            request.land(chunk.samples)
            prompt_logprobs = tuple(islice(scored, len(chunk.prompt_logprobs)))
            token = next(sampled) if chunk.samples else None
            if request.status is RequestStatus.FINISHED:
                continue
            if is_current(request, chunk):
                request.num_computed_tokens = chunk.start + chunk.num_tokens
                request.num_launched_tokens = max(request.num_launched_tokens, request.num_computed_tokens)
                self.kv.register_computed(request, chunk.start)
            request.num_prompt_logprobs += len(prompt_logprobs)
            news = None
            if token is not None:
                news = self._append(request, *token)
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
        kept = [pair for pair in scheduled.pairs if pair[0].status is RequestStatus.RUNNING]
        return SchedulerOutput.of(kept, [new_sequence(request, again=True) for request, _ in kept])

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` if a block or a slot was lost or given twice."""
        self.kv.check_integrity(self._running)
        slots = [request.slot for request in self._running if request.slot is not None]
        if sorted(slots + self._free_slots) != list(range(self._config.max_num_seqs)):
            raise IntegrityError(f"slots {slots} are used and {self._free_slots} free, of {self._config.max_num_seqs}")

    def _decode(self, draft: StepDraft) -> None:
        """A token for each that lacks but one. Nobody is preempted for who comes after the end of the budget."""
        num_preemptions = self.num_preemptions
        for request in list(self._running):
            if draft.is_full:
                break
            if request.num_left == 1 and self._has_room(request):
                draft.give(request, 1)
        draft.may_admit = self.num_preemptions == num_preemptions

    def _limit_prompts(self, decoding: list[Request], draft: StepDraft) -> int:
        """Leaves for prompts what ``Pace`` allows, which is returned, or all there is."""
        could_start = min(self.num_waiting, len(self._free_slots))
        reading = [request for request in self._running if request.num_left and request not in draft.chunks]
        token_work = self.pace.work(1, max((request.num_launched_tokens for request in reading), default=0))
        allowance = self.pace.allowance(len(decoding), len(reading) + could_start, token_work)
        if allowance < draft.num_tokens:
            first = reading[0] if reading else self._next_waiting() if could_start else None
            if first is None or not self._may_hold_up(decoding, first, allowance):
                draft.num_tokens = allowance
        return allowance

    def _next_waiting(self) -> Request | None:
        return next((request for request in self._waiting if not request.is_paused), None)

    def _may_hold_up(self, decoding: list[Request], first: Request, allowance: int) -> bool:
        """Whether a prompt is read sooner if a step is longer than ``Pace`` allows, and is worth it.

        Of a long prompt not even the end is: behind so many tokens its steps are the longest.
        """
        if first.num_left <= allowance:
            return False
        if any(request.num_hold_ups >= MAX_HOLD_UPS for request in decoding):
            return False
        num_cached = first.num_cached_tokens
        if num_cached is None:
            num_cached = first.num_tokens - self.kv.num_missing_tokens(first)
        work = self.pace.work(first.num_tokens - num_cached, num_cached)
        return work <= SOON * self._config.max_num_batched_tokens

    def _read_prompts(self, draft: StepDraft) -> None:
        """Chunks of prompts, running and waiting, level by level of priority."""
        running = [request for request in self._running if request.num_left and request not in draft.chunks]
        waiting = [request for request in self._waiting if not request.is_paused] if draft.may_admit else []
        for _, level in groupby(merge(running, waiting, key=_rank), key=attrgetter("priority")):
            if draft.is_full:
                return
            self._read_level(list(level), draft)

    def _read_level(self, level: list[Request], draft: StepDraft) -> None:
        """In the order of arrival. Those who come after a long prompt are served before it gets more than its share."""
        share = max(1, draft.num_tokens // LONG_SHARE)
        long: list[Request] = []
        for request in level:
            if draft.is_full:
                return
            if not self._is_long(request):
                self._read(request, draft.num_tokens, draft)
                continue
            long.append(request)
            if share > 0:
                share -= self._read(request, share, draft)
        for request in long:
            if draft.is_full:
                return
            self._read(request, draft.num_tokens, draft)

    def _is_long(self, request: Request) -> bool:
        """Whether what is left of its prompt is more than what a step has for those who come after a long one."""
        if request.num_left <= self._max_num_short_tokens:
            return False
        return request.slot is not None or self.kv.num_missing_tokens(request) > self._max_num_short_tokens

    def _read(self, request: Request, most: int, draft: StepDraft) -> int:
        """Gives a request a chunk of its prompt, or a longer one, if it runs or can start; how many tokens it took."""
        if not draft.has_room(request) or (request.slot is None and not self._start(request, draft)):
            return 0
        return draft.give(request, most)

    def _start(self, request: Request, draft: StepDraft) -> bool:
        """Lets a waiting request run, with blocks for all its known tokens, if it can. Else others may pass it,
        unless what it lacks is blocks or a slot."""
        if not draft.may_admit or self.kv.prefix_is_pending(request):
            return False
        if request.sampling.prompt_logprobs is not None and draft.num_prompt_logprobs <= 0:
            return False  # all its choices: the others would compute the prompt that the first is to compute
        if request.num_steps_in_flight:  # it was put off since, and a token of it is not known yet
            draft.may_admit = False
            return False
        if not self._free_slots or not self.kv.admit(request, num_spare=len(self._running)):
            draft.may_admit = False
            return False
        self._take_slot(request)
        draft.new_sequences.append(new_sequence(request))
        return True

    def _has_room(self, request: Request) -> bool:
        """A block for the newest token, if need be at the cost of the last in rank. False if that was this request."""
        while request.status is RequestStatus.RUNNING:
            if self.kv.grow(request):
                return True
            self._preempt(self._running[-1])
        return False

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
        if token_id in request.end_token_ids and len(request.output_token_ids) > request.sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(request) else None

    def _is_full(self, request: Request, num_more: int = 0) -> bool:
        """Whether it may have no token beyond those it has and ``num_more``."""
        num_output = len(request.output_token_ids) + num_more
        return num_output >= request.sampling.max_tokens or request.num_tokens + num_more >= self._max_tokens

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


def _output(
    request: Request,
    token_ids: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    reason: FinishReason | None = None,
    error: str | None = None,
) -> RequestOutput:
    num_cached = request.num_cached_tokens or 0
    return RequestOutput(request.request_id, request.choice, token_ids, logprobs, num_cached, reason, error)
