"""One model on its device: a ``StepInput`` becomes one forward and one token for each row that asked.

The log-probabilities of prompts are rows of the same forward, behind those that are sampled.
"""

from __future__ import annotations

from collections import deque
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
from lmserve.runtime.attention.base import AttentionBackend
from lmserve.runtime.decode_step import DecodeSteps
from lmserve.runtime.graphs import Graphs
from lmserve.runtime.interface import (
    FatalRunnerError,
    NewSequence,
    RunnerInfo,
    ScheduledChunk,
    StepInput,
    StepOutput,
)
from lmserve.runtime.lane import Lane
from lmserve.runtime.logprobs import RankedLogprobs, rank_logprobs
from lmserve.runtime.packed_lane import PackedLane, StepProgram
from lmserve.runtime.packing import StepPacker, alone
from lmserve.runtime.sampler import SampledTokens, Sampler, with_logprobs
from lmserve.runtime.sampling_state import Need, SamplingFlags, SamplingState
from lmserve.runtime.transfer import Moment, SideStream, fetch, send_list
from lmserve.runtime.vision.layout import PromptReader

MAX_IN_FLIGHT = 2


@dataclass(slots=True)
class _Flight:
    """A step whose results are on their way to the host, and what has to be known of its slots to read them: they may
    have other owners by then."""

    token_ids: Tensor
    """On the host once ``arrived`` has come, as the others."""
    logprobs: RankedLogprobs | None
    scored: RankedLogprobs | None
    """Of the chunks' prompt tokens, in the order of ``_prompt_positions``; None if nobody asked."""
    arrived: Moment
    owners: list[tuple[int, int]]
    """Of each sampled row: its slot, and which of the slot's owners it is."""
    num_logprobs: list[int | None]
    num_top_of_prompt: list[int]
    num_encoded: int
    tokens: list[int] | None = None
    """Known, and told to the grammars; None: not yet."""


class PackedModelRunner:
    """Implements ``lmserve.runtime.interface.ModelRunner`` for the packed lane.

    Owns what a slot remembers between steps. A sampled token is fed to the next step without passing through the host,
    so that a step can be launched before the last one is collected. Only a row with a grammar needs to know the last
    token on the host, and not before its mask is made, while the model computes.
    """

    def __init__(
        self,
        lane: Lane,
        sampler: Sampler,
        state: SamplingState,
        info: RunnerInfo,
        images: PromptReader | None = None,
    ):
        self.info = info
        self._lane = lane
        self._images = images
        self._sampler = sampler
        self._state = state
        self._device = state.device
        self._packer = StepPacker(info, state.last_tokens, images)
        self._masks = GrammarMasks(max_num_seqs=info.max_num_seqs, vocab_size=info.vocab_size)
        self._mask_stream = SideStream(self._device)
        self._decode_steps: DecodeSteps | None = None
        self._num_top_of_prompt = [0] * info.max_num_seqs
        self._num_owners = [0] * info.max_num_seqs
        self._flights: deque[_Flight] = deque()
        self._num_encoded = 0

    @property
    def program(self) -> StepProgram | None:
        """What computes its steps instead of the model's forward, if there is such a thing."""
        return self._lane.program

    @torch.inference_mode()
    def use_graphs(self, backend: AttentionBackend, graphs: Graphs) -> None:
        """From now on steps that only decode are captured. ``backend``: the packed lane's, which reads lengths there.

        Comes before the first step.
        """
        assert isinstance(self._lane, PackedLane)
        grid = self._packer.has_rotary_grid
        steps = DecodeSteps(self._lane, backend, self._sampler, self._state, self.info, graphs, has_rotary_grid=grid)
        self._decode_steps = steps

    @torch.inference_mode()
    def launch(self, step: StepInput) -> None:
        """Starts a step. On CUDA it returns while the device computes."""
        assert len(self._flights) < MAX_IN_FLIGHT, "collect comes first"
        with _fatal_if_the_device_fails():
            self._lane.begin(step.new_sequences)
            for sequence in step.new_sequences:
                self._take_slot(sequence)
            self._flights.append(self._launch(step.chunks))

    @torch.inference_mode()
    def collect(self) -> StepOutput:
        """Waits for the oldest step in flight and brings its tokens to the host."""
        assert self._flights, "launch comes first"
        flight = self._flights.popleft()
        with _fatal_if_the_device_fails():
            token_ids = self._settle(flight)
        prompt_logprobs = [] if flight.scored is None else flight.scored.to_host(flight.num_top_of_prompt)
        return StepOutput(token_ids, _logprobs(flight), prompt_logprobs, flight.num_encoded)

    def use_vocabulary(self, text: TokenizerText) -> None:
        """As the protocol says."""
        self._masks.use_vocabulary(text)

    def prepare_grammar(self, grammar: str) -> None:
        """As the protocol says."""
        self._masks.prepare(grammar)

    @torch.inference_mode()
    def use_idle_time(self) -> bool:
        """As the protocol says."""
        if self._lane.get_ready(self._packer.num_used_slots):
            return True
        with _fatal_if_the_device_fails():
            return self._decode_steps is not None and not self._flights and self._decode_steps.capture_next()

    def _take_slot(self, sequence: NewSequence) -> None:
        slot, prompt = sequence.slot, sequence.token_ids[: sequence.num_prompt_tokens]
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        self._num_owners[slot] += 1
        self._num_top_of_prompt[slot] = sequence.sampling.prompt_logprobs or 0
        if self._decode_steps is not None:
            self._decode_steps.tables.forget(slot)
        self._packer.take_slot(sequence)
        with alone(slot):
            self._masks.begin(slot, sequence.grammar, output)
        has_grammar = bool(sequence.grammar)
        self._state.set_slot(
            slot, sequence.sampling, sequence.choice, prompt, output, sequence.eos_token_ids, has_grammar=has_grammar
        )

    def _launch(self, chunks: list[ScheduledChunk]) -> _Flight:
        sampling = [chunk for chunk in chunks if chunk.samples]
        slots = [chunk.slot for chunk in sampling]
        flags = self._state.flags(slots)
        if not self._flights:
            self._masks.start(slots)  # while the model computes
        try:
            logits, is_captured = self._forward(chunks, flags)
            if self._flights and Need.GRAMMAR in flags.union:
                self._settle(self._flights[0])  # while the device computes
                self._masks.start(slots)
        finally:
            masks = self._masks.wait()
        sampled = self._draw(logits[: len(slots)], flags) if is_captured else None
        if sampled is None:
            sampled = self._sample(sampling, logits, flags, masks)
        return self._fetch(chunks, flags, sampled, self._score(chunks, logits))

    def _forward(self, chunks: list[ScheduledChunk], flags: SamplingFlags) -> tuple[Tensor, bool]:
        """The rows' logits, and whether a graph has computed them."""
        if self._decode_steps is not None:
            rows = self._packer.decode_rows(chunks)
            logits = None if rows is None else self._decode_steps.forward(rows, flags)
            if logits is not None:
                return logits, True
        return self._lane.forward(self._packer.pack(chunks, self._lane.min_rows)), False

    def _draw(self, logits: Tensor, flags: SamplingFlags) -> SampledTokens | None:
        """From a graph; None if there is none that does it."""
        assert self._decode_steps is not None
        token_ids = self._decode_steps.draw(len(logits))
        return None if token_ids is None else with_logprobs(token_ids, logits, flags)

    def _sample(
        self,
        sampling: list[ScheduledChunk],
        logits: Tensor,
        flags: SamplingFlags,
        masks: NDArray[np.int32] | None,
    ) -> SampledTokens:
        slots = send_list([chunk.slot for chunk in sampling], torch.int64, self._device)
        ends = [chunk.start + chunk.num_tokens for chunk in sampling]
        positions = send_list(ends, torch.int64, self._device)
        grammar_mask = None if masks is None else self._mask_stream.send(masks)
        return self._sampler(logits[: len(sampling)], slots, positions, flags, grammar_mask)

    def _score(self, chunks: list[ScheduledChunk], logits: Tensor) -> RankedLogprobs | None:
        """The log-probabilities of the prompt tokens that the chunks ask for; their rows follow the sampled ones."""
        token_ids = [self._packer.token(slot, position + 1) for slot, position in _prompt_positions(chunks)]
        if not token_ids:
            return None
        first_row = sum(chunk.samples for chunk in chunks)
        rows = torch.arange(first_row, first_row + len(token_ids), device=self._device)
        return rank_logprobs(logits, rows, send_list(token_ids, torch.int64, self._device))

    def _fetch(
        self,
        chunks: list[ScheduledChunk],
        flags: SamplingFlags,
        sampled: SampledTokens,
        scored: RankedLogprobs | None,
    ) -> _Flight:
        slots = [chunk.slot for chunk in chunks if chunk.samples]
        results = fetch(sampled.token_ids), _fetch_logprobs(sampled.logprobs), _fetch_logprobs(scored)
        before, self._num_encoded = self._num_encoded, 0 if self._images is None else self._images.encoder.num_encoded
        return _Flight(
            *results,
            Moment(self._device),
            owners=[(slot, self._num_owners[slot]) for slot in slots],
            num_logprobs=[self._state.num_logprobs(slot) for slot in slots],
            num_top_of_prompt=[self._num_top_of_prompt[slot] for slot, _ in _prompt_positions(chunks)],
            num_encoded=self._num_encoded - before,  # since the last launch, those of attempts that failed included
        )

    def _settle(self, flight: _Flight) -> list[int]:
        """The step's tokens, when they have arrived. The grammars hear of them, but for those that are gone."""
        if flight.tokens is None:
            flight.arrived.wait()
            flight.tokens = flight.token_ids.tolist()
            for (slot, owner), token_id in zip(flight.owners, flight.tokens, strict=True):
                if owner == self._num_owners[slot]:
                    self._masks.accept(slot, token_id)
        return flight.tokens


@contextmanager
def _fatal_if_the_device_fails() -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError as error:
        raise FatalRunnerError(str(error)) from error


def _fetch_logprobs(ranked: RankedLogprobs | None) -> RankedLogprobs | None:
    if ranked is None:
        return None
    return RankedLogprobs(fetch(ranked.chosen), fetch(ranked.top_ids), fetch(ranked.top))


def _logprobs(flight: _Flight) -> list[TokenLogprobs | None]:
    if flight.logprobs is None:
        return [None] * len(flight.num_logprobs)
    entries = flight.logprobs.to_host([count or 0 for count in flight.num_logprobs])
    return [None if count is None else entry for count, entry in zip(flight.num_logprobs, entries, strict=True)]


def _prompt_positions(chunks: list[ScheduledChunk]) -> Iterator[tuple[int, int]]:
    """Slot and position of each row that is computed for a prompt's log-probabilities."""
    for chunk in chunks:
        for position in chunk.prompt_logprobs:
            yield chunk.slot, position
