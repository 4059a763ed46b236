"""A runner without tensors that checks everything it is asked to do.

What a real cache holds at a token's slot depends on that token and all before it; so this one stores a digest of the
prefix there, and a block that is shared wrongly, written twice, stale or left over from a failed step shows at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import TokenLogprobs
from lmserve.runtime.interface import (
    FRESH_STATE,
    KEPT_STATE,
    FatalRunnerError,
    ImageReading,
    NewSequence,
    PromptImage,
    RunnerInfo,
    ScheduledChunk,
    SequenceFailed,
    StepInput,
    StepOutput,
)
from lmserve.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 7
GARBAGE = -1

Moment = Literal["launch", "written", "collect"]
Faults = Mapping[int, tuple[Moment, Exception]]
"""What is raised in which attempt at a step (from 0), and when in it. ``SequenceFailed``, which comes at the launch,
names a chunk here instead of a slot."""


class OutOfMemoryError(RuntimeError):
    """Bears the name by which the engine knows such a failure."""


class BadStep(FatalRunnerError):
    """The engine broke its contract. Fatal, so that it cannot take it for a fault of the runner and carry on."""


def digest(prefix: int, token_id: int) -> int:
    """Digest of a prefix with one token more; the empty prefix is 0."""
    return (prefix * 1_000_003 + token_id + 1) % (2**61 - 1)


def prompt_digests(token_ids: Sequence[int], images: Sequence[PromptImage] = ()) -> list[int]:
    """Of every prefix, the empty one first. An image counts, whatever tokens stand for it."""
    seen = list(token_ids)
    for image in images:
        for position in range(image.start, image.end):
            seen[position] = VOCAB_SIZE + zlib.crc32(f"{image.content} {position - image.start}".encode())
    return list(accumulate(seen, digest, initial=0))


def next_token(prefix: int, sampling: SamplingParams, choice: int, ends: frozenset[int], num_output: int) -> int:
    """The token that follows a prefix: arbitrary, the same for equal arguments, and no end before ``min_tokens``."""
    token_id = (prefix ^ (sampling.seed * 7_919 + choice * 104_729)) * 2_654_435_761 % 4_294_967_291 % VOCAB_SIZE
    while num_output < sampling.min_tokens and token_id in ends:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def prompt_logprob(prefix: int) -> TokenLogprobs:
    """The log-probability of a prompt's token: arbitrary, another one for each prefix that the token ends."""
    return TokenLogprobs(-float(prefix % 1_000_003), ())


def make_info(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    images: ImageReading = "none",
    launches_ahead: bool = False,
    num_saved_states: int | None = None,
    whole_prompts: bool = False,
) -> RunnerInfo:
    """What the fake model says of itself."""
    return RunnerInfo(
        architecture="Fake",
        device="none",
        dtype="none",
        attention_backend="none",
        lane="fake",
        num_parameters=0,
        weight_bytes=0,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        images=images,
        launches_ahead=launches_ahead,
        num_saved_states=num_saved_states,
        whole_prompts=whole_prompts,
    )


@dataclass
class _Sequence:
    new: NewSequence
    token_ids: list[int]
    is_lost: bool = False
    """A step that it was in will fail when it is collected; the engine cannot know it yet."""
    digests: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = prompt_digests(self.token_ids, self.new.images)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.digests.append(digest(self.digests[-1], token_id))

    def sample(self) -> int:
        sampling = self.new.sampling
        ends = frozenset((*sampling.stop_token_ids, *self.new.eos_token_ids))
        num_output = len(self.token_ids) - self.new.num_prompt_tokens
        return next_token(self.digests[-1], sampling, self.new.choice, ends, num_output)


@dataclass
class _Flight:
    """A step that is computed and not collected, or will fail at its collection."""

    step: StepInput
    output: StepOutput
    error: Exception | None = None


class _States:
    """A recurrent state is the digest of all tokens before. It moves on when the next step does not tell it again."""

    def __init__(self, num_saved: int) -> None:
        self._held: dict[int, int] = {}
        self._saved = [GARBAGE] * num_saved
        self._coming: dict[int, int] = {}
        self._to_save: dict[int, int] = {}

    def begin(self, new_sequences: Sequence[NewSequence]) -> None:
        for row, state in self._to_save.items():
            self._saved[row] = state
        told = {new.slot: new.state for new in new_sequences}
        self._held |= {slot: state for slot, state in self._coming.items() if slot not in told}
        self._coming, self._to_save = {}, {}
        for slot, state in told.items():
            if state != KEPT_STATE:
                self._held[slot] = 0 if state == FRESH_STATE else self._saved[state]

    def check(self, chunk: ScheduledChunk, digests: Sequence[int]) -> None:
        _check(self._held[chunk.slot] == digests[chunk.start], f"slot {chunk.slot} has a state that is not its own")
        places = [save.num_tokens for save in chunk.saves]
        _check(places == sorted(set(places)), "states are saved in no order")
        _check(all(chunk.start < place <= chunk.start + chunk.num_tokens for place in places), "no state there to save")

    def move_on(self, chunks: Sequence[ScheduledChunk], digests: Mapping[int, Sequence[int]]) -> None:
        rows = [save.row for chunk in chunks for save in chunk.saves]
        _check(len(set(rows)) == len(rows) and set(rows) <= set(range(len(self._saved))), f"rows {rows} to save to")
        for chunk in chunks:
            self._coming[chunk.slot] = digests[chunk.slot][chunk.start + chunk.num_tokens]
            self._to_save |= {save.row: digests[chunk.slot][save.num_tokens] for save in chunk.saves}


class FakeRunner:
    """Implements ``ModelRunner``, and fails when ``faults`` says so. Launching ahead, it holds two steps.

    Raises:
        BadStep: the engine asked for something that a real runner would get wrong.
    """

    def __init__(self, info: RunnerInfo, faults: Faults | None = None) -> None:
        self.info = info
        self.num_attempts = 0
        self.steps: list[StepInput] = []
        """Those that were computed."""
        self._faults = faults or {}
        self._content = [GARBAGE] * (info.num_blocks * info.block_size)
        self._sequences: dict[int, _Sequence] = {}
        self._in_flight: list[_Flight] = []
        self._states = None if info.num_saved_states is None else _States(info.num_saved_states)
        self.vocabulary: TokenizerText | None = None
        self.prepared_grammars: set[str] = set()
        self.num_idle_times = 0
        self.idle_times = 1
        """That there is something to do in, after each other."""

    def use_vocabulary(self, text: TokenizerText) -> None:
        _check(self.vocabulary is None, "the vocabulary twice")
        self.vocabulary = text

    def use_idle_time(self) -> bool:
        self.num_idle_times += 1
        return self.num_idle_times % self.idle_times > 0

    def prepare_grammar(self, grammar: str) -> None:
        _check(self.vocabulary is not None, "a grammar without vocabulary")
        self.prepared_grammars.add(grammar)

    def launch(self, step: StepInput) -> None:
        _check(len(self._in_flight) < 1 + self.info.launches_ahead, "too many steps at a time")
        attempt, self.num_attempts = self.num_attempts, self.num_attempts + 1
        moment, error = self._faults.get(attempt, (None, RuntimeError()))
        self._check_shape(step)
        for new in step.new_sequences:
            _check(not new.grammar or new.grammar in self.prepared_grammars, "a grammar without notice")
            self._sequences[new.slot] = _Sequence(new, list(new.token_ids))
        if self._states is not None:
            self._states.begin(step.new_sequences)
        self._check_budget(step)
        for chunk in step.chunks:
            self._check_chunk(chunk)
        if isinstance(error, SequenceFailed):
            self._lose(step)
            raise SequenceFailed(step.chunks[error.slot % len(step.chunks)].slot)
        if moment == "launch":
            self._lose(step)
            raise error
        for chunk in step.chunks:
            self._write(chunk, garbage=moment is not None)
        if moment == "written":
            self._lose(step)
            raise error
        if self._states is not None:
            self._states.move_on(step.chunks, {slot: sequence.digests for slot, sequence in self._sequences.items()})
        self._in_flight.append(_Flight(step, self._compute(step), None if moment is None else error))
        if moment is not None:
            for chunk in step.chunks:
                self._sequences[chunk.slot].is_lost = True

    def collect(self) -> StepOutput:
        _check(bool(self._in_flight), "nothing was launched")
        flight = self._in_flight.pop(0)
        if flight.error is not None:
            if not self._in_flight:
                self._lose(flight.step)
            raise flight.error
        self.steps.append(flight.step)
        return flight.output

    def _compute(self, step: StepInput) -> StepOutput:
        """As the device does: in the order of the launches, before anything of it is known."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: list[TokenLogprobs] = []
        for chunk in step.chunks:
            sequence = self._sequences[chunk.slot]
            prompt_logprobs += [prompt_logprob(sequence.digests[p + 2]) for p in chunk.prompt_logprobs]
            if chunk.samples:
                token_ids.append(sequence.sample())
                sequence.append(token_ids[-1])
                wanted = sequence.new.sampling.logprobs is not None
                logprobs.append(TokenLogprobs(-float(token_ids[-1]), ()) if wanted else None)
        return StepOutput(token_ids, logprobs, prompt_logprobs)

    def _lose(self, step: StepInput) -> None:
        """After a failure nothing is known of the step's sequences, unless the engine tells it anew."""
        for chunk in step.chunks:
            del self._sequences[chunk.slot]

    def _check_shape(self, step: StepInput) -> None:
        slots = [chunk.slot for chunk in step.chunks]
        _check(bool(slots), "an empty step")
        _check(len(set(slots)) == len(slots) and set(slots) <= set(range(self.info.max_num_seqs)), f"slots {slots}")
        new_slots = [new.slot for new in step.new_sequences]
        _check(len(set(new_slots)) == len(new_slots) and set(new_slots) <= set(slots), "a new sequence without chunk")
        is_decode = [chunk.samples and chunk.num_tokens == 1 for chunk in step.chunks]
        _check(is_decode == sorted(is_decode, reverse=True), "decodes come first")
        self._check_blocks(step.chunks)

    def _check_budget(self, step: StepInput) -> None:
        """Only an image or a prompt that has to be taken whole may exceed it, and then nobody comes after it."""
        budget, last = self.info.max_num_batched_tokens, step.chunks[-1]
        if step.num_tokens <= budget:
            return
        if self.info.whole_prompts:
            _check(all(chunk.num_tokens == 1 for chunk in step.chunks[:-1]), "two prompts are more than the budget")
            return
        images = self._sequences[last.slot].new.images if self.info.images == "whole" else ()
        whole = [image for image in images if image.start <= last.start < image.end == last.start + last.num_tokens]
        within = step.num_tokens - last.num_tokens < budget
        _check(bool(whole) and within, f"{step.num_tokens} tokens in one step")

    def _check_blocks(self, chunks: Sequence[ScheduledChunk]) -> None:
        """A block that one sequence writes belongs to no other."""
        size = self.info.block_size
        readers: dict[int, int] = {}
        for chunk in chunks:
            table = chunk.block_table
            _check(len(table) * size >= chunk.start + chunk.num_tokens, "a block table that is too short")
            _check(len(set(table)) == len(table), "a block twice in one table")
            _check(set(table) <= set(range(self.info.num_blocks)), f"block table {table}")
            for block in table:
                readers[block] = readers.get(block, 0) + 1
        for chunk in chunks:
            for i in range(chunk.start // size, (chunk.start + chunk.num_tokens - 1) // size + 1):
                _check(readers[chunk.block_table[i]] == 1, "a block that is written is in two tables")

    def _check_chunk(self, chunk: ScheduledChunk) -> None:
        sequence = self._sequences.get(chunk.slot)
        if sequence is None:
            raise BadStep(f"nobody is in slot {chunk.slot}")
        num_known, end = len(sequence.token_ids), chunk.start + chunk.num_tokens
        _check(chunk.num_tokens > 0 and end <= num_known, "tokens that are not there")
        images = sequence.new.images
        _check(not images or self.info.images != "none", "images for a model that reads none")
        cut = self.info.images == "whole" and any(image.start < end < image.end for image in images)
        _check(not cut, "a step ends inside an image")
        _check(chunk.samples == (end == num_known and sequence.new.sampling.max_tokens > 0), "samples is wrong")
        whole = chunk.num_tokens == 1 or (chunk.start == 0 and end == num_known)
        _check(whole or not self.info.whole_prompts, "a prompt in pieces")
        for position in chunk.prompt_logprobs:
            _check(chunk.start <= position < end, "a prompt log-probability of a token that is not computed")
            _check(position + 1 < sequence.new.num_prompt_tokens, "a prompt log-probability beyond the prompt")
        asked = sequence.new.sampling.prompt_logprobs is not None and sequence.new.choice == 0
        _check(asked or not chunk.prompt_logprobs, "prompt log-probabilities that nobody asked for")
        if sequence.is_lost:
            return
        found = [self._content[self._where(chunk, position)] for position in range(chunk.start)]
        _check(found == sequence.digests[1 : chunk.start + 1], f"slot {chunk.slot} reads what is not its own")
        if self._states is not None:
            self._states.check(chunk, sequence.digests)

    def _write(self, chunk: ScheduledChunk, *, garbage: bool) -> None:
        digests = self._sequences[chunk.slot].digests
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            self._content[self._where(chunk, position)] = GARBAGE if garbage else digests[position + 1]

    def _where(self, chunk: ScheduledChunk, position: int) -> int:
        size = self.info.block_size
        return chunk.block_table[position // size] * size + position % size


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise BadStep(message)
