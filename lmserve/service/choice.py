"""One choice of one request: its tokens come in, its deltas go out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmserve.outputs import FinishReason, RequestOutput
from lmserve.sampling_params import SamplingParams
from lmserve.service.deltas import (
    CallDelta,
    ChoiceDelta,
    Finished,
    PositionLogprobs,
    ReasoningDelta,
    StopReason,
    TextDelta,
)
from lmserve.service.detokenizer import IncrementalDetokenizer
from lmserve.service.parsing.events import (
    CONTROL_BEGIN,
    CONTROL_END,
    CallArguments,
    CallBegin,
    ContentText,
    Event,
    OutputParser,
    ReasoningText,
)
from lmserve.service.stop_strings import StopPatterns, StopStrings
from lmserve.service.token_table import TokenTable


@dataclass(frozen=True, slots=True)
class Parsing:
    """How a choice's output is taken apart."""

    parser: OutputParser
    controls: Mapping[int, str]
    """Control tokens that the parser wants to see, by id, as they stand in its input."""
    make_call_id: Callable[[], str]


class Choice:
    """Detokenizes one choice, takes it apart, ends it at a stop string, and keeps its whole text for the log.

    Without ``parsing`` all text is content. Stop strings are looked for in content only. Log-probabilities travel with
    the content of their token: those of a held-back token wait, those of reasoning, calls, a stop string or the token
    that ended the choice are never sent, the last unless it ``reports_end``. ``text_offset``: length of the echo that
    the text follows. ``num_healed``: characters at the beginning that belong to the prompt.
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
        num_healed: int = 0,
        parsing: Parsing | None = None,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finished: Finished | None = None
        self.num_reasoning_tokens = 0
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop)
        self._table = table
        self._reports_end = reports_end
        self._parsing = parsing
        self._logprobs = _ContentLogprobs(text_offset)
        assert num_healed == 0 or parsing is None, "parsers read from the beginning"
        self._input_end = -num_healed
        """Characters of text, control tokens as the parser sees them, so far. Negative: still in the prompt's end."""
        self._num_calls = 0
        self._deltas: list[ChoiceDelta] = []
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """Everything up to now, without the echo; where it is taken apart, as the model wrote it."""
        text = "".join(self._texts)
        return text if self._parsing is None else _without_marks(text)

    def push(self, output: RequestOutput, *, context_full: bool) -> list[ChoiceDelta]:
        """Take a step's news. ``context_full``: after it there is no room for another token."""
        reason = output.finish_reason
        ends_with_stop_token = reason is FinishReason.STOP
        last = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            is_end = position == last and ends_with_stop_token
            if output.logprobs and (self._reports_end or not is_end):
                entry = PositionLogprobs.of(token_id, output.logprobs[position], self._table, self._input_end)
                self._logprobs.add(entry)
            if is_end:
                break
            self._take(self._split(token_id))
            if self._stop.matched is not None:
                break
        if reason is not None and self._stop.matched is None:
            self._take(self._split_rest())
        if self._stop.matched is not None:
            self._finish(FinishReason.STOP, StopReason.STOP_STRING_FOUND)
        elif reason is not None:
            self._send(self._stop.finish(), is_end=True)
            self._finish(reason, self._stop_reason(reason, context_full))
        deltas, self._deltas = _joined(self._deltas), []
        return deltas

    def _split(self, token_id: int) -> Sequence[Event]:
        """What a token adds."""
        parsing = self._parsing
        if parsing is None:
            return self._content(self._detokenizer.push(token_id))
        was_reasoning = parsing.parser.is_reasoning
        mark = parsing.controls.get(token_id)
        text = _without_marks(self._detokenizer.push(token_id)) if mark is None else mark
        events = self._parse(text)
        self.num_reasoning_tokens += was_reasoning or parsing.parser.is_reasoning
        return events

    def _split_rest(self) -> Sequence[Event]:
        """What the end adds."""
        text = self._detokenizer.finish()
        if self._parsing is None:
            return self._content(text)
        return [*self._parse(text), *self._parsing.parser.finish()]

    def _content(self, text: str) -> Sequence[Event]:
        start, self._input_end = self._input_end, self._input_end + len(text)
        text, start = text[max(0, -start) :], max(0, start)
        return [ContentText(text, start)] if text else []

    def _parse(self, text: str) -> Sequence[Event]:
        assert self._parsing is not None
        if not text:
            return ()
        self._input_end += len(text)
        self._texts.append(text)
        return self._parsing.parser.push(text)

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, ContentText):
                self._logprobs.place(event)
                is_early = len(self.token_ids) < self._sampling.min_tokens
                self._send(event.text if is_early else self._stop.push(event.text))
                if self._stop.matched is not None:
                    return
                continue
            self._send(self._stop.finish())
            match event:
                case ReasoningText(text):
                    self._deltas.append(ReasoningDelta(self.index, text))
                case CallBegin(index, name):
                    assert self._parsing is not None
                    self._num_calls += 1
                    self._deltas.append(CallDelta(self.index, index, self._parsing.make_call_id(), name, ""))
                case CallArguments(index, text):
                    self._deltas.append(CallDelta(self.index, index, None, None, text))

    def _send(self, text: str, *, is_end: bool = False) -> None:
        """Content. Empty text is sent with the log-probabilities that the end brings, if any."""
        logprobs = self._logprobs.release(len(text), everything=is_end and self._parsing is None)
        if text or logprobs:
            if self._parsing is None:
                self._texts.append(text)
            self._deltas.append(TextDelta(self.index, text, logprobs))

    def _finish(self, reason: FinishReason, stop_reason: StopReason) -> None:
        self.finished = Finished(self.index, reason, stop_reason, self._num_calls > 0)
        self._deltas.append(self.finished)

    def _stop_reason(self, reason: FinishReason, context_full: bool) -> StopReason:
        if reason is FinishReason.STOP:
            return StopReason.TOOL_CALLS if self._num_calls else StopReason.EOS_FOUND
        return StopReason.CONTEXT_LENGTH_REACHED if context_full else StopReason.MAX_PREDICTED_TOKENS_REACHED


def _without_marks(text: str) -> str:
    """Nobody but us is to write what tells a parser of control tokens."""
    if CONTROL_BEGIN in text or CONTROL_END in text:
        return text.replace(CONTROL_BEGIN, "").replace(CONTROL_END, "")
    return text


class _ContentLogprobs:
    """Log-probabilities on their way: by the place of their token in the input first, then in the content."""

    def __init__(self, text_offset: int) -> None:
        self._text_offset = text_offset
        self._unplaced: deque[PositionLogprobs] = deque()
        self._waiting: deque[PositionLogprobs] = deque()
        self._content_end = text_offset
        """Of the content that is known, sent or not."""
        self._sent_end = text_offset

    def add(self, entry: PositionLogprobs) -> None:
        """``entry.text_offset``: in the input."""
        if entry.text_offset >= 0:
            self._unplaced.append(entry)

    def place(self, content: ContentText) -> None:
        """Those whose token begins in this content wait for it; those before it belong to none."""
        start, end = content.start, content.start + len(content.text)
        while self._unplaced and self._unplaced[0].text_offset < end:
            entry = self._unplaced.popleft()
            if entry.text_offset >= start:
                self._waiting.append(entry.at(self._content_end + entry.text_offset - start))
        self._content_end += len(content.text)

    def release(self, length: int, *, everything: bool = False) -> tuple[PositionLogprobs, ...]:
        """Those whose text begins in the ``length`` characters that are sent now; or all, at the regular end."""
        self._sent_end += length
        if everything:
            self._waiting.extend(entry.at(self._text_offset + entry.text_offset) for entry in self._unplaced)
            self._unplaced.clear()
        released = []
        while self._waiting and (everything or self._waiting[0].text_offset < self._sent_end):
            released.append(self._waiting.popleft())
        return tuple(released)


def _joined(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Neighbours of one kind made one: a step of several tokens is one event of a stream."""
    joined: list[ChoiceDelta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(delta.choice, last.text + delta.text, last.logprobs + delta.logprobs)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            joined[-1] = ReasoningDelta(delta.choice, last.text + delta.text)
        elif isinstance(delta, CallDelta) and isinstance(last, CallDelta) and delta.id is None and last.id is None:
            if delta.index != last.index:
                joined.append(delta)
            else:
                joined[-1] = CallDelta(delta.choice, delta.index, None, None, last.arguments + delta.arguments)
        else:
            joined.append(delta)
    return joined
