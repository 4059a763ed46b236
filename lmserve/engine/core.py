"""The engine: requests in, one step after another, outputs out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import AddRequest, Cancel, EngineStats, Pause, Resume, StepOutputs, ToWorker, UseVocabulary
from lmserve.engine.request import Request, RequestStatus
from lmserve.engine.scheduler import Scheduler, SchedulerConfig, max_request_tokens
from lmserve.engine.step_draft import SchedulerOutput
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import FatalRunnerError, ModelRunner, RunnerInfo, SequenceFailed, StepOutput

STEP_FAILED = "The engine step that held this request failed. The request is lost; it can be sent again."

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Launched:
    """A step that the runner has been given."""

    scheduled: SchedulerOutput
    began: float
    """When it was launched."""
    computed: StepOutput | None = None
    """None: it is not collected, or has failed."""


def limits_of(info: RunnerInfo, *, prefix_caching: bool = True, mixed_step_factor: float = math.inf) -> SchedulerConfig:
    """What the runner can do, as limits of its scheduler."""
    return SchedulerConfig(
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        whole_images=info.images == "whole",
        whole_prompts=info.whole_prompts,
        prefix_caching=prefix_caching,
        mixed_step_factor=mixed_step_factor,
        context_cost=info.context_cost,
    )


class EngineCore:
    """One model's live requests, and the step that takes them on. Synchronous: one thread calls everything.

    What a cancel frees is free at once: a step that is still on its way comes before all that use it again.
    """

    def __init__(
        self, runner: ModelRunner, config: SchedulerConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        info = runner.info
        kv = KVCacheManager(info.num_blocks, info.block_size, info.num_saved_states)
        self.scheduler = Scheduler(config, kv)
        self._runner = runner
        self._clock = clock
        self._launches_ahead = info.launches_ahead
        self._in_flight: _Launched | None = None
        self._collected = 0.0
        """When the last step was."""
        self._prefix_caching = config.prefix_caching
        self._max_tokens = min(max_request_tokens(info), config.max_model_len)
        self._live: dict[str, dict[int, Request]] = {}
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_encoded_images = 0
        self._num_cancelled = 0
        self._num_finished = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        return self._in_flight is not None or self.scheduler.num_running + self.scheduler.num_waiting > 0

    @property
    def stats(self) -> EngineStats:
        """Counters since the start, gauges as of now."""
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_paused=self.scheduler.num_paused,
            num_free_blocks=self.scheduler.kv.num_free_blocks,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self.scheduler.num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_encoded_images=self._num_encoded_images,
            num_preemptions=self.scheduler.num_preemptions,
            num_cancelled=self._num_cancelled,
            num_finished=self._num_finished,
        )

    def handle(self, message: ToWorker) -> list[RequestOutput]:
        """Takes up what the API process says."""
        if isinstance(message, AddRequest):
            return self.add_request(message)
        if isinstance(message, Cancel):
            return self.cancel(message)
        if isinstance(message, Pause):
            self.pause(message)
        elif isinstance(message, Resume):
            self.resume(message)
        elif isinstance(message, UseVocabulary):
            self._runner.use_vocabulary(message.text)
        else:
            raise AssertionError(f"{type(message).__name__} has no place in the running engine")
        return []

    def report(self, outputs: list[RequestOutput]) -> StepOutputs:
        """The message that brings the news."""
        return StepOutputs(outputs, self.stats)

    def add_request(self, message: AddRequest) -> list[RequestOutput]:
        """Queues the ``n`` choices of a request; nothing comes back, or one refusal for each choice.

        The API process has refused what a client can get wrong. A refusal here is a bug of ours, and costs nobody else.
        """
        problem = self._problem(message)
        if problem is not None:
            logger.error("Request %s is refused by the engine: %s", message.request_id, problem)
            return [
                RequestOutput(
                    message.request_id, choice, finish_reason=FinishReason.ERROR, error=problem, may_retry=False
                )
                for choice in range(message.sampling.n)
            ]
        cache_root = b"" if self._prefix_caching else b"request %d" % self._num_arrivals
        if message.grammar:
            self._runner.prepare_grammar(message.grammar)
        requests = [self._make_request(message, choice, cache_root) for choice in range(message.sampling.n)]
        self.scheduler.kv.hash_full_blocks(requests[0])
        for request in requests:
            request.block_hashes = list(requests[0].block_hashes)  # hashing a long prompt once is enough
            self.scheduler.add(request)
        self._live[message.request_id] = {request.choice: request for request in requests}
        return []

    def cancel(self, message: Cancel) -> list[RequestOutput]:
        """Ends a request, or one choice of it, and frees its blocks. What is not alive any more is ignored."""
        live = self._live.get(message.request_id, {})
        chosen = [request for choice, request in live.items() if message.choice in (None, choice)]
        outputs = [self.scheduler.finish(request, FinishReason.ABORT) for request in chosen]
        self._take_note(outputs)
        return outputs

    def pause(self, message: Pause) -> None:
        """Computes nothing more for a request until it is resumed; others get its blocks."""
        for request in self._live.get(message.request_id, {}).values():
            self.scheduler.pause(request)

    def resume(self, message: Resume) -> None:
        """Goes on with a paused request."""
        for request in self._live.get(message.request_id, {}).values():
            self.scheduler.resume(request)

    def step(self) -> list[RequestOutput]:
        """Schedules and runs one step; the news of its requests. A failed step costs each of them one error.

        A runner that launches ahead is given the next step before the last one is collected, so that the device never
        waits for the host: the news is then that of the step before, and a sequence that has ended in it is computed
        once in vain.

        Raises:
            FatalRunnerError: the device can no longer be trusted.
        """
        outputs: list[RequestOutput] = []
        launched = self._launch_next(outputs)
        if self._launches_ahead:
            if launched is not None:
                self.scheduler.advance(launched.scheduled)
            launched, self._in_flight = self._in_flight, launched
            if launched is not None:
                launched.computed = self._try_to_collect(launched)
        if launched is not None:
            outputs += self._news(launched)
        self._take_note(outputs)
        return outputs

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` if a block, a slot or a request was lost. Looks at every block: for idle times."""
        self.scheduler.check_integrity()
        num_live = sum(map(len, self._live.values()))
        num_known = self.scheduler.num_running + self.scheduler.num_waiting + self.scheduler.num_paused
        if num_live != num_known:
            raise IntegrityError(f"{num_live} requests are alive, and the scheduler knows {num_known}")

    def use_idle_time(self) -> bool:
        """Does a little of what makes later steps shorter; whether there is more of it to do."""
        return self._runner.use_idle_time()

    def _launch_next(self, outputs: list[RequestOutput]) -> _Launched | None:
        """Schedules a step and launches it; without launching ahead, computes it, too. None if there is none.

        If it fails for one sequence it is launched without; out of memory, the later half is put off and the rest tried
        once more; else its requests are lost. Their news are added to ``outputs``.
        """
        scheduled = self.scheduler.schedule()
        may_halve = True
        while scheduled.requests:
            try:
                launched = _Launched(scheduled, self._clock())
                self._runner.launch(scheduled.step)
                if not self._launches_ahead:
                    launched.computed = self._collect(launched)
                return launched
            except FatalRunnerError:
                raise
            except SequenceFailed as error:
                logger.exception("A request failed; the %d others of its step do not.", len(scheduled.requests) - 1)
                failed = [request for request in scheduled.requests if request.slot == error.slot]
                outputs += self._settle()  # the others are told anew, with all their tokens
                outputs += self._give_up(failed or scheduled.requests)
                scheduled = self.scheduler.remaining(scheduled)
            except Exception as error:
                logger.exception("An engine step of %d requests failed.", len(scheduled.requests))
                outputs += self._settle()
                scheduled = self.scheduler.remaining(scheduled)
                may_halve = may_halve and is_out_of_memory(error) and len(scheduled.requests) > 1
                if not may_halve:
                    outputs += self._give_up(scheduled.requests)
                    return None
                scheduled, may_halve = self.scheduler.halve(scheduled), False
        return None

    def _settle(self) -> list[RequestOutput]:
        """Waits for the step that is on its way, so that all tokens are known; its news."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return []
        launched.computed = self._try_to_collect(launched)
        return self._news(launched)

    def _news(self, launched: _Launched) -> list[RequestOutput]:
        scheduled, computed = launched.scheduled, launched.computed
        if computed is None:
            return self._give_up(self.scheduler.lose(scheduled))
        self._count(scheduled, computed)
        return self.scheduler.update(scheduled, computed)

    def _give_up(self, requests: list[Request]) -> list[RequestOutput]:
        alive = [request for request in requests if request.status is not RequestStatus.FINISHED]
        return [self.scheduler.finish(request, FinishReason.ERROR, STEP_FAILED) for request in alive]

    def _try_to_collect(self, launched: _Launched) -> StepOutput | None:
        """None: it failed. Another step has been launched behind it, so that there is no trying again."""
        try:
            return self._collect(launched)
        except FatalRunnerError:
            raise
        except Exception:
            logger.exception("An engine step of %d requests failed.", len(launched.scheduled.requests))
            return None

    def _collect(self, launched: _Launched) -> StepOutput:
        step = launched.scheduled.step
        output = self._runner.collect()
        now = self._clock()
        seconds = now - max(launched.began, self._collected)  # the device does one after the other
        self._collected = now
        num_wanted = sum(chunk.samples for chunk in step.chunks)
        if not len(output.token_ids) == len(output.logprobs) == num_wanted:
            raise RuntimeError(f"the runner gave {len(output.token_ids)} tokens for {num_wanted} sequences")
        num_wanted = sum(len(chunk.prompt_logprobs) for chunk in step.chunks)
        if len(output.prompt_logprobs) != num_wanted:
            raise RuntimeError(f"the runner scored {len(output.prompt_logprobs)} prompt tokens for {num_wanted}")
        if not output.num_encoded_images and not output.prompt_logprobs:  # they take time that is not a chunk's
            self.scheduler.pace.observe(step, seconds)
        return output

    def _count(self, scheduled: SchedulerOutput, computed: StepOutput) -> None:
        self._num_steps += 1
        self._num_encoded_images += computed.num_encoded_images
        for request, chunk in zip(scheduled.requests, scheduled.step.chunks, strict=True):
            if chunk.num_tokens > 1 or chunk.start < request.num_prompt_tokens:
                self._num_prompt_tokens += chunk.num_tokens

    def _take_note(self, outputs: list[RequestOutput]) -> None:
        """Counts, and forgets the choices that ended."""
        for output in outputs:
            self._num_generated_tokens += len(output.token_ids)
            if output.finish_reason is None:
                continue
            if output.finish_reason is FinishReason.ABORT:
                self._num_cancelled += 1
            else:
                self._num_finished += 1
            live = self._live[output.request_id]
            del live[output.choice]
            if not live:
                del self._live[output.request_id]

    def _problem(self, message: AddRequest) -> str | None:
        """Why the request cannot be served, if so."""
        prompt, sampling = message.prompt_token_ids, message.sampling
        if message.request_id in self._live:
            return "A request with this id is running already."
        if not prompt:
            return "The prompt is empty."
        named = [*prompt, *sampling.stop_token_ids, *(token_id for token_id, _ in sampling.logit_bias)]
        vocab_size = self._runner.info.vocab_size
        if min(named) < 0 or max(named) >= vocab_size:
            return f"A token id is outside of the vocabulary, which has {vocab_size}."
        if len(prompt) + min(1, sampling.max_tokens) > self._max_tokens:
            return f"The prompt has {len(prompt)} tokens, and one request can have {self._max_tokens} with its output."
        if message.images and self._runner.info.images == "none":
            return "The model reads no images."
        if message.images and sampling.prompt_logprobs is not None:
            return "There are no log-probabilities of a prompt with images."
        return None

    def _make_request(self, message: AddRequest, choice: int, cache_root: bytes) -> Request:
        self._num_arrivals += 1
        return Request(
            request_id=message.request_id,
            choice=choice,
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            eos_token_ids=tuple(message.eos_token_ids),
            priority=message.priority,
            images=tuple(message.images),
            grammar=message.grammar,
            arrival=self._num_arrivals,
            cache_root=cache_root,
        )


def is_out_of_memory(error: Exception) -> bool:
    """By name: the runtime's tensor library is not to be imported here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
