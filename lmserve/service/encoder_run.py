"""One request on its way through an encoder's engine, with its events on the log stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmserve.errors import ModelUnloaded, StepFailed
from lmserve.outputs import EncoderOutput
from lmserve.runtime.interface import EncoderInput
from lmserve.service.log_stream import LogEvent, LogStream, now_ms
from lmserve.service.patience import first_in_time
from lmserve.service.protocols import ModelEntry

PROGRESS_SECONDS = 1.0
"""Between two events that say how far a request is."""


class EncoderRun:
    """Runs a request to the end, or until it is cancelled."""

    def __init__(
        self,
        request_id: str,
        entry: ModelEntry,
        inputs: list[EncoderInput],
        texts: list[str] | None,
        log: LogStream,
    ) -> None:
        self._id = request_id
        self._entry = entry
        self._inputs = inputs
        self._texts = texts
        self._log = log
        self._num_done = 0
        self._num_tokens_done = 0
        self._began = self._said = time.perf_counter()
        self._status = "userStopped"

    async def rows(
        self, outputs: AsyncGenerator[EncoderOutput, None], row_size: int, seconds: float
    ) -> NDArray[np.float32]:
        """(inputs, row_size) float32, in the order of the inputs. The first news have to come within ``seconds``.

        Raises:
            FirstTokenTimeout: they do not.
            StepFailed: the engine lost the request. Other exceptions are the engine's own.
        """
        rows = np.empty((len(self._inputs), row_size), np.float32)
        self._log.publish(self._input_event)
        try:
            async with aclosing(outputs):
                self._take(await first_in_time(outputs, seconds), rows)
                async for output in outputs:
                    self._take(output, rows)
            self._status = "finished"
            return rows
        except Exception as error:
            self._status = "modelUnloaded" if isinstance(error, ModelUnloaded) else "failed"
            raise
        finally:
            self._log.publish(self._output_event)

    def _take(self, output: EncoderOutput, rows: NDArray[np.float32]) -> None:
        if output.error is not None:
            raise StepFailed(output.error)
        done = list(output.indices)
        rows[done] = np.frombuffer(output.rows, "<f4").reshape(len(done), rows.shape[1])
        self._take_note(done)

    def _take_note(self, done: list[int]) -> None:
        self._num_done += len(done)
        self._num_tokens_done += sum(len(self._inputs[index].token_ids) for index in done)
        now = time.perf_counter()
        if now - self._said >= PROGRESS_SECONDS and self._num_done < len(self._inputs):
            self._said = now
            self._log.publish(self._progress_event)

    def _event(self, kind: str) -> LogEvent:
        return {
            "timestamp": now_ms(),
            "type": f"embedding.{kind}",
            "modelIdentifier": self._entry.model_id,
            "modelPath": self._entry.path,
            "request_id": self._id,
        }

    def _input_event(self) -> LogEvent:
        counts = [len(each.token_ids) for each in self._inputs]
        return {
            **self._event("input"),
            "inputs": self._texts or [],
            "inputsCount": len(self._inputs),
            "promptTokensCount": sum(counts),
            "longestInputTokensCount": max(counts),
            "tokenIds": [each.token_ids for each in self._inputs],
        }

    def _progress_event(self) -> LogEvent:
        return {**self._event("progress"), **self._figures()}

    def _output_event(self) -> LogEvent:
        return {**self._event("output"), **self._figures(), "status": self._status}

    def _figures(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        return {
            "inputsDone": self._num_done,
            "inputsCount": len(self._inputs),
            "promptTokensCount": self._num_tokens_done,
            "seconds": round(seconds, 3),
            "tokensPerSecond": self._num_tokens_done / seconds if seconds > 0 else 0.0,
        }
