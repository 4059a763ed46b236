"""One prompt on its way through the engine, with its two events on the log stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from lmserve.engine.messages import AddRequest
from lmserve.errors import NotReady, StepFailed
from lmserve.outputs import FinishReason, RequestOutput
from lmserve.service.choice import Choice
from lmserve.service.deltas import Delta, Finished, StopReason, TextDelta, Usage
from lmserve.service.log_stream import LogEvent, LogStream, now_ms
from lmserve.service.request import GenerationRequest


class PromptRun:
    """Runs prompt number ``index`` of a request: all its choices, to the end or until its generator is closed."""

    def __init__(self, request: GenerationRequest, index: int, log: LogStream) -> None:
        self._request = request
        self._log = log
        self._prompt = request.prompts[index]
        self._sampling = request.sampling[index]
        self._id = request.request_id if len(request.prompts) == 1 else f"{request.request_id}-{index}"
        text = request.model.text
        self._choices = [
            Choice(
                index * request.n + i,
                self._sampling,
                text.detokenizer(begins_text=request.begins_text),
                request.stop,
                text.table,
            )
            for i in range(request.n)
        ]
        self._unfinished = request.n
        self._num_cached = 0
        self._began = time.perf_counter()
        self._first_token: float | None = None
        self._failed = False

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The choices' deltas as they come, and the usage last.

        Raises:
            StepFailed: the engine lost the request; other exceptions are the engine's own.
        """
        self._log.publish(self._input_event)
        add = AddRequest(
            request_id=self._id,
            prompt_token_ids=self._prompt.token_ids,
            sampling=self._sampling,
            eos_token_ids=self._request.model.text.eos_token_ids,
            priority=self._request.priority,
        )
        try:
            async with aclosing(self._request.model.engine.generate(add)) as outputs:
                async for output in outputs:
                    for delta in self._take(output):
                        yield delta
                    if not self._unfinished:
                        break
            yield self._usage()
        except Exception:
            self._failed = True
            raise
        finally:
            self._log.publish(self._output_event)

    def _take(self, output: RequestOutput) -> list[TextDelta | Finished]:
        choice = self._choices[output.choice]
        if choice.finished is not None:  # the engine's last words on a choice that a stop string ended
            return []
        if output.finish_reason is FinishReason.ERROR:
            raise StepFailed(output.error or "The engine failed at this request.")
        if output.finish_reason is FinishReason.ABORT:
            raise NotReady("The server ended this request.")
        if output.token_ids:
            self._first_token = self._first_token or time.perf_counter()
        if output.choice == 0:
            self._num_cached = output.num_cached_tokens
        used = len(self._prompt.token_ids) + len(choice.token_ids) + len(output.token_ids)
        deltas = choice.push(output, context_full=used >= self._request.context_length)
        if deltas and isinstance(deltas[-1], Finished):
            self._unfinished -= 1
            if output.finish_reason is None and self._unfinished:
                self._request.model.engine.cancel(self._id, output.choice)
        return deltas

    def _usage(self) -> Usage:
        """Up to now."""
        generated = sum(len(choice.token_ids) for choice in self._choices)
        usage = Usage(len(self._prompt.token_ids), generated, self._num_cached)
        if self._first_token is None:
            return usage
        now = time.perf_counter()
        return replace(
            usage, time_to_first_token=self._first_token - self._began, generation_time=now - self._first_token
        )

    def _event(self, kind: str) -> LogEvent:
        entry = self._request.model.entry
        return {
            "timestamp": now_ms(),
            "type": f"llm.prediction.{kind}",
            "modelIdentifier": entry.model_id,
            "modelPath": entry.path,
            "request_id": self._id,
        }

    def _input_event(self) -> LogEvent:
        text, sampling = self._request.model.text, self._sampling
        prompt = self._prompt.text
        if prompt is None:
            prompt = text.decode(self._prompt.token_ids, skip_special_tokens=False)
        names = [name for name in sampling.__dataclass_fields__ if name not in ("logit_bias", "repetition_penalty")]
        parameters = {name: getattr(sampling, name) for name in names}
        return {
            **self._event("input"),
            "input": prompt,
            "promptTokensCount": len(self._prompt.token_ids),
            "parameters": {
                **parameters,
                "repeat_penalty": sampling.repetition_penalty,
                "logit_bias": {str(token_id): bias for token_id, bias in sampling.logit_bias},
                "stop": self._request.stop,
            },
            "tokenIds": self._prompt.token_ids,
        }

    def _output_event(self) -> LogEvent:
        usage = self._usage()
        seconds = usage.generation_time
        waited = time.perf_counter() - self._began if self._first_token is None else usage.time_to_first_token
        outputs = [
            {"index": choice.index, "output": choice.text, "stopReason": self._stop_reason(choice).value}
            for choice in self._choices
        ]
        return {
            **self._event("output"),
            "output": outputs[0]["output"],
            "choices": outputs,
            "stats": {
                "stopReason": outputs[0]["stopReason"],
                "tokensPerSecond": usage.num_completion_tokens / seconds if seconds > 0 else 0.0,
                "timeToFirstTokenSec": waited,
                "promptTokensCount": usage.num_prompt_tokens,
                "predictedTokensCount": usage.num_completion_tokens,
                "totalTokensCount": usage.num_prompt_tokens + usage.num_completion_tokens,
                "cachedPromptTokensCount": usage.num_cached_tokens,
            },
            "tokenIds": [choice.token_ids for choice in self._choices],
        }

    def _stop_reason(self, choice: Choice) -> StopReason:
        if choice.finished is not None:
            return choice.finished.stop_reason
        return StopReason.FAILED if self._failed else StopReason.USER_STOPPED
