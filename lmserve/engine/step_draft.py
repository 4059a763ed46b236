"""One step in the making: who gets which tokens, and what is left of its budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lmserve.engine.request import Request
from lmserve.runtime.interface import KEPT_STATE, NewSequence, ScheduledChunk, StepInput


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step, decided: ``requests[i]`` gets ``step.chunks[i]``."""

    requests: list[Request]
    step: StepInput

    @property
    def pairs(self) -> Iterator[tuple[Request, ScheduledChunk]]:
        return zip(self.requests, self.step.chunks, strict=True)

    @classmethod
    def of(cls, pairs: Iterable[tuple[Request, ScheduledChunk]], new_sequences: list[NewSequence]) -> SchedulerOutput:
        """The pairs in the order in which the runner wants them: decodes first, else as they come."""
        ordered = sorted(pairs, key=lambda pair: not pair[1].is_decode)
        chunks = [chunk for _, chunk in ordered]
        return cls([request for request, _ in ordered], StepInput(chunks, new_sequences))


@dataclass(slots=True)
class StepDraft:
    """What has been given out so far, and what is left. A request has one chunk, which may be replaced by a longer."""

    num_tokens: int
    """Left. An image or a prompt that had to be taken whole may bring it below 0."""
    num_prompt_logprobs: int
    """Rows left for the log-probabilities of prompts. A prompt that had to be taken whole may bring it below 0."""
    whole_images: bool = False
    whole_prompts: bool = False
    """See ``SchedulerConfig``."""
    may_admit: bool = True
    """Whether waiting requests may start in this step."""
    chunks: dict[Request, ScheduledChunk] = field(default_factory=dict)
    new_sequences: list[NewSequence] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        return self.num_tokens <= 0

    def has_room(self, request: Request) -> bool:
        """Whether it may be given tokens: always, but for a whole prompt that exceeds a budget, behind another one."""
        if not self.whole_prompts or all(chunk.num_tokens == 1 for chunk in self.chunks.values()):
            return True
        num_rows = len(request.unreported(0, request.num_tokens))
        return request.num_left <= self.num_tokens and num_rows <= self.num_prompt_logprobs

    def give(self, request: Request, most: int) -> int:
        """Gives a request that runs up to ``most`` tokens more; how many it took.

        It takes none if it has log-probabilities to report and others have used up the rows.
        """
        before = self.chunks.pop(request, None)
        if before is not None:
            self._take(before, -1)
            most += before.num_tokens
        start = request.num_launched_tokens
        end = start + self._fitting(request, min(most, self.num_tokens))
        if self.whole_images:
            end = request.end_of_whole_images(start, end)
        if self.whole_prompts:
            end = start + request.num_left
        if end > start:
            chunk = make_chunk(request, end)
            self.chunks[request] = chunk
            self._take(chunk)
        return end - start - (before.num_tokens if before is not None else 0)

    def finish(self, complete: Callable[[Request, ScheduledChunk], ScheduledChunk]) -> SchedulerOutput:
        """The step. ``complete`` has the last word on each chunk, but for its tokens."""
        pairs = [(request, complete(request, chunk)) for request, chunk in self.chunks.items()]
        return SchedulerOutput.of(pairs, self.new_sequences)

    def _fitting(self, request: Request, most: int) -> int:
        """How many tokens of a request fit, by its need and the rows that are left; ``most`` at the most."""
        start = request.num_launched_tokens
        num_tokens = min(most, request.num_left)
        unreported = request.unreported(start, start + num_tokens)
        if len(unreported) > self.num_prompt_logprobs:
            return unreported[self.num_prompt_logprobs] - start
        return num_tokens

    def _take(self, chunk: ScheduledChunk, sign: int = 1) -> None:
        self.num_tokens -= sign * chunk.num_tokens
        self.num_prompt_logprobs -= sign * len(chunk.prompt_logprobs)


def is_current(request: Request, chunk: ScheduledChunk) -> bool:
    """Whether the request still has the blocks that the chunk is written to. Each time it starts it has a new list."""
    return request.block_table is chunk.block_table


def make_chunk(request: Request, end: int) -> ScheduledChunk:
    """What is not computed yet of a running request's tokens, up to ``end``."""
    assert request.slot is not None
    start = request.num_launched_tokens
    samples = end - start == request.num_left and request.sampling.max_tokens > 0
    return ScheduledChunk(
        request.slot, start, end - start, request.block_table, samples, request.unreported(start, end)
    )


def new_sequence(request: Request, *, again: bool = False) -> NewSequence:
    """What the runner is told of a request that takes a slot, or ``again`` of one that has it."""
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
        KEPT_STATE if again else request.state,
    )
