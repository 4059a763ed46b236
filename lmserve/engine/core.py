"""The engine: requests in, one step after another, outputs out. Token ids only; knows neither text nor tensors."""

from __future__ import annotations

import logging
from dataclasses import replace

from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.messages import AddRequest, Cancel, EngineStats
from lmserve.engine.request import Request
from lmserve.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput, max_request_tokens
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.runtime.interface import FatalRunnerError, ModelRunner, StepOutput

logger = logging.getLogger(__name__)

STEP_FAILED = "The engine step that held this request failed; the request is lost, and others are not affected."


class EngineCore:
    """One model's requests and the loop body that advances them. Synchronous: the worker calls it from one thread."""

    def __init__(self, runner: ModelRunner, config: SchedulerConfig) -> None:
        info = runner.info
        self._runner = runner
        self._max_tokens = max_request_tokens(info)
        self._prefix_caching = config.prefix_caching
        kv = KVCacheManager(info.num_blocks, info.block_size, keeps_contents=config.prefix_caching)
        self._scheduler = Scheduler(config, kv)
        self._live: dict[str, list[Request]] = {}
        self._num_arrivals = 0
        self._counts = EngineStats()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return replace(
            self._counts,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._scheduler.kv.num_free_blocks,
            num_preemptions=self._scheduler.num_preemptions,
        )

    def add_request(self, message: AddRequest) -> list[RequestOutput]:
        """Queues the ``n`` choices of a request. Returns nothing, or one refusal a choice.

        The API process has checked all this before; a refusal here is our own mistake, and costs only this request.
        """
        problem = self._problem(message)
        if problem is not None:
            return [
                RequestOutput(message.request_id, choice, finish_reason=FinishReason.ERROR, error=problem)
                for choice in range(message.sampling.n)
            ]
        requests = [self._make_request(message, choice) for choice in range(message.sampling.n)]
        self._num_arrivals += 1
        self._live[message.request_id] = requests
        for request in requests:
            self._scheduler.add(request)
        return []

    def cancel(self, message: Cancel) -> list[RequestOutput]:
        """Ends a request or one choice at once; its blocks are free when this returns. Unknown ids are ignored."""
        chosen = [
            request
            for request in self._live.get(message.request_id, [])
            if message.choice is None or request.choice == message.choice
        ]
        outputs = [self._scheduler.finish(request, FinishReason.ABORT) for request in chosen]
        self._forget(outputs)
        return outputs

    def step(self) -> list[RequestOutput]:
        """Schedules, runs and takes note of one step; the news of its requests.

        A fault of the runner costs the requests of this step, each of which gets one error.

        Raises:
            FatalRunnerError: the device can no longer be trusted.
        """
        scheduled = self._scheduler.schedule()
        if not scheduled.requests:
            return []
        try:
            computed, output = self._run(scheduled)
        except FatalRunnerError:
            raise
        except Exception:
            logger.exception("An engine step failed; its %d requests are lost.", len(scheduled.requests))
            outputs = [self._scheduler.finish(r, FinishReason.ERROR, STEP_FAILED) for r in scheduled.requests]
        else:
            outputs = self._scheduler.update(computed, output)
            self._count(computed, outputs)
        self._forget(outputs)
        return outputs

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks or slots were lost. For when there is nothing to do."""
        self._scheduler.check_integrity()
        assert self.has_work or not self._live, "a finished request is still known"

    def _run(self, scheduled: SchedulerOutput) -> tuple[SchedulerOutput, StepOutput]:
        """Runs the step. On a device that is out of memory the later half is put back, and the rest tried once more."""
        try:
            self._runner.launch(scheduled.step)
            return scheduled, self._runner.collect()
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            fewer = self._scheduler.halve(scheduled)
            if len(fewer.requests) in (0, len(scheduled.requests)):
                raise
        self._runner.launch(fewer.step)
        return fewer, self._runner.collect()

    def _count(self, scheduled: SchedulerOutput, outputs: list[RequestOutput]) -> None:
        counts, chunks = self._counts, scheduled.step.chunks
        num_decodes = 0
        num_cached = counts.num_cached_tokens
        new_slots = {sequence.slot for sequence in scheduled.step.new_sequences}
        for request, chunk in zip(scheduled.requests, chunks, strict=True):
            num_decodes += chunk.start >= len(request.prompt_token_ids)
            if chunk.slot in new_slots:
                num_cached += chunk.start
        self._counts = replace(
            counts,
            num_steps=counts.num_steps + 1,
            num_prompt_tokens=counts.num_prompt_tokens + scheduled.step.num_tokens - num_decodes,
            num_cached_tokens=num_cached,
            num_generated_tokens=counts.num_generated_tokens + sum(len(output.token_ids) for output in outputs),
        )

    def _forget(self, outputs: list[RequestOutput]) -> None:
        """Finished choices are no longer known."""
        for output in outputs:
            if output.finish_reason is None:
                continue
            rest = [r for r in self._live[output.request_id] if r.choice != output.choice]
            if rest:
                self._live[output.request_id] = rest
            else:
                del self._live[output.request_id]
            cancelled = output.finish_reason is FinishReason.ABORT
            self._counts = replace(
                self._counts,
                num_finished=self._counts.num_finished + (not cancelled),
                num_cancelled=self._counts.num_cancelled + cancelled,
            )

    def _problem(self, message: AddRequest) -> str | None:
        total = len(message.prompt_token_ids) + message.sampling.max_tokens
        if message.request_id in self._live:
            return "A request with this id is running already."
        if not message.prompt_token_ids:
            return "The prompt is empty."
        if total > self._max_tokens:
            return f"The request needs {total} tokens, and the engine holds {self._max_tokens} for one request."
        return None

    def _make_request(self, message: AddRequest, choice: int) -> Request:
        sampling = message.sampling
        ends = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *message.eos_token_ids)
        return Request(
            request_id=message.request_id,
            choice=choice,
            prompt_token_ids=message.prompt_token_ids,
            sampling=sampling,
            stop_token_ids=frozenset(ends),
            eos_token_ids=tuple(message.eos_token_ids),
            priority=message.priority,
            arrival=self._num_arrivals,
            salt=b"" if self._prefix_caching else message.request_id.encode(),
        )


def _is_out_of_memory(error: Exception) -> bool:
    """By name: torch's own error class is not to be imported here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
