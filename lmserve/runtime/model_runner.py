"""One model on its device: a ``StepInput`` becomes one packed forward and one token for each row that asked.

The log-probabilities of prompts are rows of the same forward, behind those that are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.grammar.mask import GrammarMasks
from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import TokenLogprobs
from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import (
    FatalRunnerError,
    NewSequence,
    RunnerInfo,
    ScheduledChunk,
    SequenceFailed,
    StepInput,
    StepOutput,
)
from lmserve.runtime.logprobs import RankedLogprobs, rank_logprobs
from lmserve.runtime.packed_lane import PackedBatch, PackedLane, StepProgram
from lmserve.runtime.sampler import SampledTokens, Sampler
from lmserve.runtime.sampling_state import SamplingState
from lmserve.runtime.vision.layout import ImageRows, PromptLayout, PromptReader


@dataclass(frozen=True, slots=True)
class _Step:
    """What is on its way to the host."""

    chunks: list[ScheduledChunk]
    sampled: SampledTokens
    scored: RankedLogprobs | None
    """Of the chunks' prompt tokens, in the order of ``_prompt_positions``; None if nobody asked."""


class PackedModelRunner:
    """Implements ``lmserve.runtime.interface.ModelRunner`` for the packed lane.

    Owns what a slot remembers between steps: the known tokens on the host (to feed prompt chunks) and, on the device,
    the token sampled last and the sampling state. A sampled token is fed to the next step without passing through the
    host.
    """

    def __init__(
        self,
        lane: PackedLane,
        sampler: Sampler,
        state: SamplingState,
        info: RunnerInfo,
        images: PromptReader | None = None,
    ):
        self._lane = lane
        self._images = images
        self._layouts: list[PromptLayout | None] = [None] * info.max_num_seqs
        self._num_position_rows = 4 if images is not None and images.has_rotary_grid else 1
        self._sampler = sampler
        self._state = state
        self.info = info
        self._device = lane.model.device
        self._scratch_slot = info.num_blocks * info.block_size
        self._known_tokens: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * info.max_num_seqs
        self._num_top_of_prompt = [0] * info.max_num_seqs
        self._last_tokens = torch.zeros(info.max_num_seqs, dtype=torch.int64, device=self._device)
        self._masks = GrammarMasks(max_num_seqs=info.max_num_seqs, vocab_size=info.vocab_size)
        self._num_used_slots = 0
        """Of the KV cache, up to the last that was ever written."""
        self._in_flight: _Step | None = None
        self._num_encoded = 0

    @property
    def program(self) -> StepProgram | None:
        """What computes its steps instead of the model's forward, if there is such a thing."""
        return self._lane.program

    @torch.inference_mode()
    def launch(self, step: StepInput) -> None:
        """Starts a step. On CUDA it returns while the device computes."""
        assert self._in_flight is None, "one step at a time"
        for sequence in step.new_sequences:
            self._take_slot(sequence)
        batch = self._pack(step.chunks)
        self._masks.start([chunk.slot for chunk in step.chunks if chunk.samples])  # while the model computes
        try:
            logits = self._lane.forward(batch)
        except torch.AcceleratorError as error:
            raise FatalRunnerError(str(error)) from error
        finally:
            masks = self._masks.wait()
        sampled = self._sample(step.chunks, logits, masks)
        scored = self._score(step.chunks, logits)
        self._in_flight = _Step(step.chunks, sampled, scored)

    @torch.inference_mode()
    def collect(self) -> StepOutput:
        """Waits for the step and brings its tokens to the host."""
        assert self._in_flight is not None, "launch comes first"
        step, self._in_flight = self._in_flight, None
        logprobs = self._logprobs(step.chunks, step.sampled)
        prompt_logprobs = self._prompt_logprobs(step)
        token_ids: list[int] = step.sampled.token_ids.tolist()
        for chunk, token_id in zip((chunk for chunk in step.chunks if chunk.samples), token_ids, strict=True):
            self._masks.accept(chunk.slot, token_id)
        return StepOutput(token_ids, logprobs, prompt_logprobs, self._newly_encoded())

    def use_vocabulary(self, text: TokenizerText) -> None:
        """As the protocol says."""
        self._masks.use_vocabulary(text)

    def prepare_grammar(self, grammar: str) -> None:
        """As the protocol says."""
        self._masks.prepare(grammar)

    def use_idle_time(self) -> bool:
        """As the protocol says."""
        return self._lane.get_ready(self._num_used_slots)

    def _newly_encoded(self) -> int:
        """Images since it was asked last, those of attempts that failed included."""
        before, self._num_encoded = self._num_encoded, 0 if self._images is None else self._images.encoder.num_encoded
        return self._num_encoded - before

    def _take_slot(self, sequence: NewSequence) -> None:
        self._known_tokens[sequence.slot] = np.array(sequence.token_ids, dtype=np.int64)
        self._num_top_of_prompt[sequence.slot] = sequence.sampling.prompt_logprobs or 0
        self._layouts[sequence.slot] = None
        if sequence.images:
            assert self._images is not None, "the engine has refused images"
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            with _alone(sequence.slot):
                self._layouts[sequence.slot] = self._images.read(prompt, sequence.images)
        with _alone(sequence.slot):
            self._masks.begin(sequence.slot, sequence.grammar, sequence.token_ids[sequence.num_prompt_tokens :])
        self._state.set_slot(
            sequence.slot,
            sequence.sampling,
            sequence.choice,
            sequence.token_ids[: sequence.num_prompt_tokens],
            sequence.token_ids[sequence.num_prompt_tokens :],
            sequence.eos_token_ids,
            has_grammar=bool(sequence.grammar),
        )

    def _pack(self, chunks: list[ScheduledChunk]) -> PackedBatch:
        """The chunks side by side, padded to ``min_rows`` with rows that write to scratch and attend to nothing."""
        block_size = self.info.block_size
        num_rows = max(self._lane.min_rows, sum(chunk.num_tokens for chunk in chunks))
        ids = np.zeros(num_rows, np.int64)
        positions = np.zeros((self._num_position_rows, num_rows), np.int64)
        slots = np.full(num_rows, self._scratch_slot, np.int64)
        spans, logits_rows, prompt_rows = [], [], []
        device_rows, device_slots = [], []
        images = ImageRows()
        row = 0
        for chunk in chunks:
            end_row, end = row + chunk.num_tokens, chunk.start + chunk.num_tokens
            known = self._known_tokens[chunk.slot]
            if chunk.start < known.size:
                ids[row:end_row] = known[chunk.start : end]
            else:
                device_rows.append(row)
                device_slots.append(chunk.slot)
            if chunk.num_tokens == 1:
                positions[:, row] = chunk.start
                slots[row] = chunk.block_table[chunk.start // block_size] * block_size + chunk.start % block_size
            else:
                where = np.arange(chunk.start, end)
                table = np.array(chunk.block_table[: -(-end // block_size)], np.int64)
                positions[:, row:end_row] = where
                slots[row:end_row] = table[where // block_size] * block_size + where % block_size
            layout = self._layouts[chunk.slot]
            if layout is not None:
                self._pack_images(layout, chunk, row, positions, images)
            runs = () if layout is None else layout.runs
            spans.append(Span(row, chunk.num_tokens, end, chunk.block_table, runs))
            if chunk.samples:
                logits_rows.append(end_row - 1)
            prompt_rows += [row + position - chunk.start for position in chunk.prompt_logprobs]
            row = end_row
        self._num_used_slots = max(self._num_used_slots, int(slots[:row].max(initial=-1)) + 1)
        logits_rows += prompt_rows
        logits_rows += [0] * (self._lane.min_rows - len(logits_rows))
        input_ids = self._to_device(ids)
        if device_rows:
            last = self._last_tokens.index_select(0, self._index(device_slots))
            input_ids.index_copy_(0, self._index(device_rows), last)
        return PackedBatch(
            input_ids,
            self._to_device(positions if len(positions) > 1 else positions[0]),
            self._to_device(slots),
            self._index(logits_rows),
            spans,
            images if images.rows else None,
        )

    def _pack_images(
        self, layout: PromptLayout, chunk: ScheduledChunk, row: int, positions: NDArray[np.int64], found: ImageRows
    ) -> None:
        """A chunk of a sequence with images: its rotary positions, and what goes into the rows of ``found``."""
        assert self._images is not None
        end = chunk.start + chunk.num_tokens
        if layout.positions is not None:
            positions[1:, row : row + chunk.num_tokens] = layout.rotary_positions(chunk.start, end)
        with _alone(chunk.slot):
            layout.add_rows(found, self._images.encoder.encode, row, chunk.start, end)

    def _sample(self, chunks: list[ScheduledChunk], logits: Tensor, masks: NDArray[np.int32] | None) -> SampledTokens:
        sampling = [chunk for chunk in chunks if chunk.samples]
        slots = [chunk.slot for chunk in sampling]
        slots_tensor = self._index(slots)
        positions = self._index([chunk.start + chunk.num_tokens for chunk in sampling])
        grammar_mask = None if masks is None else torch.from_numpy(masks).to(self._device, non_blocking=True)
        flags = self._state.flags(slots)
        sampled = self._sampler(logits[: len(slots)], slots_tensor, positions, flags, grammar_mask)
        self._last_tokens.index_copy_(0, slots_tensor, sampled.token_ids)
        return sampled

    def _score(self, chunks: list[ScheduledChunk], logits: Tensor) -> RankedLogprobs | None:
        """The log-probabilities of the prompt tokens that the chunks ask for; their rows follow the sampled ones."""
        token_ids = [int(self._known_tokens[slot][position + 1]) for slot, position in _prompt_positions(chunks)]
        if not token_ids:
            return None
        first_row = sum(chunk.samples for chunk in chunks)
        rows = torch.arange(first_row, first_row + len(token_ids), device=self._device)
        return rank_logprobs(logits, rows, self._index(token_ids))

    def _logprobs(self, chunks: list[ScheduledChunk], sampled: SampledTokens) -> list[TokenLogprobs | None]:
        wanted = [self._state.num_logprobs(chunk.slot) for chunk in chunks if chunk.samples]
        if sampled.logprobs is None:
            return [None] * len(wanted)
        logprobs = sampled.logprobs.to_host([count or 0 for count in wanted])
        return [None if count is None else entry for count, entry in zip(wanted, logprobs, strict=True)]

    def _prompt_logprobs(self, step: _Step) -> list[TokenLogprobs]:
        if step.scored is None:
            return []
        return step.scored.to_host([self._num_top_of_prompt[slot] for slot, _ in _prompt_positions(step.chunks)])

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


@contextmanager
def _alone(slot: int) -> Iterator[None]:
    """What goes wrong with an image or a grammar goes wrong for its own sequence.

    An image's file is gone if its request has just been cancelled.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        raise SequenceFailed(slot) from error


def _prompt_positions(chunks: list[ScheduledChunk]) -> Iterator[tuple[int, int]]:
    """Slot and position of each row that is computed for a prompt's log-probabilities."""
    for chunk in chunks:
        for position in chunk.prompt_logprobs:
            yield chunk.slot, position
