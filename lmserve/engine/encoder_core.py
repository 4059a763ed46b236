"""The engine of an encoder: texts in, one packed step after another, vectors out."""

from __future__ import annotations

import logging
from collections import defaultdict

from lmserve.engine.block_pool import IntegrityError
from lmserve.engine.core import STEP_FAILED, is_out_of_memory
from lmserve.engine.encoder_queue import EncoderQueue, EncoderRequest, Pick
from lmserve.engine.messages import Cancel, Encode, EncoderOutputs, EngineStats, ToWorker
from lmserve.outputs import EncoderOutput
from lmserve.runtime.interface import EncoderInput, EncoderRunner, FatalRunnerError

logger = logging.getLogger(__name__)


class EncoderCore:
    """An encoder's live requests, and the step that takes them on. Synchronous: one thread calls everything."""

    def __init__(self, runner: EncoderRunner) -> None:
        self._runner = runner
        self._queue = EncoderQueue()
        self._num_steps = 0
        self._num_tokens = 0
        self._num_finished = 0
        self._num_cancelled = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do."""
        return self._queue.num_waiting > 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=self._queue.num_waiting,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_tokens,
            num_cancelled=self._num_cancelled,
            num_finished=self._num_finished,
        )

    def handle(self, message: ToWorker) -> list[EncoderOutput]:
        """Takes up what the API process says."""
        if isinstance(message, Encode):
            return self._add(message)
        if isinstance(message, Cancel):
            self._num_cancelled += self._queue.remove(message.request_id)
            return []
        raise AssertionError(f"{type(message).__name__} has no place in the running engine of an encoder")

    def use_idle_time(self) -> bool:
        """There is nothing to prepare."""
        return False

    def step(self) -> list[EncoderOutput]:
        """Picks and computes one step; the news of its requests. A failed step costs each of them one error.

        Raises:
            FatalRunnerError: the device can no longer be trusted.
        """
        picks = self._queue.pick(self._runner.info.max_num_batched_tokens)
        rows = self._encode(picks)
        if rows is None and len(picks) > 1:
            half = len(picks) // 2
            self._queue.put_back(picks[half:])
            picks = picks[:half]
            rows = self._encode(picks, last=True)
        self._num_steps += 1
        return self._failed(picks) if not rows else self._done(picks, rows)

    def report(self, outputs: list[EncoderOutput]) -> EncoderOutputs:
        """The message that brings the news."""
        return EncoderOutputs(outputs, self.stats)

    def check_integrity(self) -> None:
        """Raises ``IntegrityError`` if a request was lost. For idle times."""
        if self._queue.live:
            raise IntegrityError(f"{len(self._queue.live)} requests are alive, and nothing of them waits")

    def _add(self, message: Encode) -> list[EncoderOutput]:
        """The API process has refused what a client can get wrong: a refusal here is a bug of ours."""
        problem = self._problem(message)
        if problem is not None:
            logger.error("Request %s is refused by the engine: %s", message.request_id, problem)
            return [EncoderOutput(message.request_id, error=problem)]
        self._queue.add(message.request_id, message.inputs)
        return []

    def _problem(self, message: Encode) -> str | None:
        info = self._runner.info
        if message.request_id in self._queue.live:
            return "A request with this id is running already."
        if not message.inputs or not all(each.token_ids for each in message.inputs):
            return "An input is empty."
        if any(min(each.token_ids) < 0 or max(each.token_ids) >= info.vocab_size for each in message.inputs):
            return f"A token id is outside of the vocabulary, which has {info.vocab_size}."
        longest = max(len(each.token_ids) for each in message.inputs)
        if longest > info.max_model_len:
            return f"An input has {longest} tokens, and the model takes {info.max_model_len}."
        return None

    def _encode(self, picks: list[Pick], *, last: bool = False) -> list[bytes] | None:
        """The picks' rows. Empty: they are lost. None: the memory did not suffice, fewer may do."""
        inputs: list[EncoderInput] = [request.inputs[index] for request, index in picks]
        try:
            rows = self._runner.encode(inputs)
            if len(rows) != len(inputs):
                raise RuntimeError(f"the runner gave {len(rows)} rows for {len(inputs)} inputs")
        except FatalRunnerError:
            raise
        except Exception as error:
            logger.exception("An engine step of %d inputs failed.", len(picks))
            return None if is_out_of_memory(error) and not last else []
        self._num_tokens += sum(len(each.token_ids) for each in inputs)
        return rows

    def _done(self, picks: list[Pick], rows: list[bytes]) -> list[EncoderOutput]:
        done: defaultdict[str, list[tuple[int, bytes]]] = defaultdict(list)
        for (request, index), row in zip(picks, rows, strict=True):
            done[request.request_id].append((index, row))
            self._finish_one(request)
        return [
            EncoderOutput(request_id, tuple(index for index, _ in pairs), b"".join(row for _, row in pairs))
            for request_id, pairs in done.items()
        ]

    def _finish_one(self, request: EncoderRequest) -> None:
        request.num_unfinished -= 1
        if not request.num_unfinished:
            self._queue.remove(request.request_id)
            self._num_finished += 1

    def _failed(self, picks: list[Pick]) -> list[EncoderOutput]:
        failed = dict.fromkeys(request.request_id for request, _ in picks)
        for request_id in failed:
            self._queue.remove(request_id)
            self._num_finished += 1
        return [EncoderOutput(request_id, error=STEP_FAILED) for request_id in failed]
