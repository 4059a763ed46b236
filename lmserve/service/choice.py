"""One choice of one request: its tokens come in, its deltas go out."""

from __future__ import annotations

from collections import deque

from lmserve.outputs import FinishReason, RequestOutput
from lmserve.sampling_params import SamplingParams
from lmserve.service.deltas import Finished, PositionLogprobs, StopReason, TextDelta
from lmserve.service.detokenizer import IncrementalDetokenizer
from lmserve.service.stop_strings import StopPatterns, StopStrings
from lmserve.service.token_table import TokenTable


class Choice:
    """Detokenizes one choice, ends it at a stop string, and keeps its whole text for the log.

    Log-probabilities travel with the text of their token: those of a held-back token wait, those of a stop string or
    of the token that ended the choice are never sent, the latter unless it ``reports_end``. ``text_offset``: length of
    the echo that the text follows.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        stop: StopPatterns,
        table: TokenTable,
        *,
        text_offset: int = 0,
        reports_end: bool = False,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finished: Finished | None = None
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._table = table
        self._reports_end = reports_end
        self._waiting: deque[PositionLogprobs] = deque()
        self._decoded_end = text_offset
        self._sent_end = text_offset
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """Everything sent so far, without the echo."""
        return "".join(self._texts)

    def push(self, output: RequestOutput, *, context_full: bool) -> list[TextDelta | Finished]:
        """Take a step's news. ``context_full``: after it there is no room for another token."""
        sent: list[str] = []
        reason = output.finish_reason
        ends_with_stop_token = reason is FinishReason.STOP
        last = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            is_end = position == last and ends_with_stop_token
            if output.logprobs and (self._reports_end or not is_end):
                entry = PositionLogprobs.of(token_id, output.logprobs[position], self._table, self._decoded_end)
                self._waiting.append(entry)
            if is_end:
                break
            text = self._detokenizer.push(token_id)
            sent.append(self._decide(text))
            if self._stop.matched is not None:
                self._finish(FinishReason.STOP, StopReason.STOP_STRING_FOUND)
                return self._deltas("".join(sent))
        if reason is not None:
            sent.append(self._decide(self._detokenizer.finish()))
            if self._stop.matched is not None:
                self._finish(FinishReason.STOP, StopReason.STOP_STRING_FOUND)
            else:
                sent.append(self._stop.finish())
                self._finish(reason, _stop_reason(reason, context_full))
        return self._deltas("".join(sent))

    def _decide(self, text: str) -> str:
        self._decoded_end += len(text)
        return text if len(self.token_ids) < self._sampling.min_tokens else self._stop.push(text)

    def _finish(self, reason: FinishReason, stop_reason: StopReason) -> None:
        self.finished = Finished(self.index, reason, stop_reason)

    def _deltas(self, text: str) -> list[TextDelta | Finished]:
        logprobs = self._released(len(text)) if self._waiting else ()
        deltas: list[TextDelta | Finished] = []
        if text or logprobs:
            self._sent_end += len(text)
            self._texts.append(text)
            deltas.append(TextDelta(self.index, text, logprobs))
        if self.finished is not None:
            deltas.append(self.finished)
        return deltas

    def _released(self, length: int) -> tuple[PositionLogprobs, ...]:
        """Of the waiting tokens, those whose text begins in what is sent now; at the regular end, the rest as well."""
        end = self._sent_end + length
        keep_rest = self.finished is None or self._stop.matched is not None
        released = []
        while self._waiting and (self._waiting[0].text_offset < end or not keep_rest):
            released.append(self._waiting.popleft())
        return tuple(released)


def _stop_reason(reason: FinishReason, context_full: bool) -> StopReason:
    if reason is FinishReason.STOP:
        return StopReason.EOS_FOUND
    return StopReason.CONTEXT_LENGTH_REACHED if context_full else StopReason.MAX_PREDICTED_TOKENS_REACHED
