"""From the engine's chunks to the rows of one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import NewSequence, RunnerInfo, ScheduledChunk, SequenceFailed
from lmserve.runtime.packed_lane import PackedBatch
from lmserve.runtime.transfer import send, send_list
from lmserve.runtime.vision.layout import ImageRows, PromptLayout, PromptReader


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """A step of which each row is the newest token of another sequence."""

    slots: NDArray[np.int64]
    """(rows,), as the arrays below."""
    positions: NDArray[np.int64]
    known: NDArray[np.int64]
    """The tokens; -1 where it is the one that was sampled last for the slot, which the device has."""
    rotary_positions: NDArray[np.int64]
    """Of models with M-RoPE, the same in time, height and width."""
    block_tables: list[list[int]]


class StepPacker:
    """Owns what the host knows of each slot's sequence: its tokens, to feed prompt chunks, and its images.

    ``last_tokens``: on the device, by slot, the token sampled last: those of decoding sequences.
    """

    def __init__(self, info: RunnerInfo, last_tokens: Tensor, images: PromptReader | None) -> None:
        self._block_size = info.block_size
        self._scratch_slot = info.num_blocks * info.block_size
        self._last_tokens = last_tokens
        self._images = images
        self._known_tokens: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * info.max_num_seqs
        self._layouts: list[PromptLayout | None] = [None] * info.max_num_seqs
        self._rotary_offsets = [0] * info.max_num_seqs
        """What the rotary position of a token after the prompt is ahead of its position."""
        self.num_used_slots = 0
        """Of the KV cache, up to the last that was ever written."""

    @property
    def has_rotary_grid(self) -> bool:
        """Whether tokens have three positions (M-RoPE) besides their index."""
        return self._images is not None and self._images.has_rotary_grid

    def take_slot(self, sequence: NewSequence) -> None:
        """The slot has a new owner. Raises SequenceFailed."""
        slot = sequence.slot
        self._known_tokens[slot] = np.array(sequence.token_ids, dtype=np.int64)
        self._layouts[slot] = None
        self._rotary_offsets[slot] = 0
        if not sequence.images:
            return
        assert self._images is not None, "the engine has refused images"
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        with alone(slot):
            layout = self._layouts[slot] = self._images.read(prompt, sequence.images)
        if layout.positions is not None:
            self._rotary_offsets[slot] = int(layout.rotary_positions(len(prompt), len(prompt) + 1)[0, 0]) - len(prompt)

    def token(self, slot: int, position: int) -> int:
        """One of those that the owner came with."""
        return int(self._known_tokens[slot][position])

    def decode_rows(self, chunks: list[ScheduledChunk]) -> DecodeRows | None:
        """None if the step has other rows, too, or rows of a prompt with images."""
        numbers = []
        for chunk in chunks:
            if not chunk.is_decode or chunk.prompt_logprobs:
                return None
            slot, position = chunk.slot, chunk.start
            known = self._known_tokens[slot]
            is_known = position < known.size
            if is_known and self._layouts[slot] is not None:
                return None
            token = known[position] if is_known else -1
            numbers.append((slot, position, token, position + self._rotary_offsets[slot]))
        if not numbers:
            return None
        slots, positions, tokens, rotary_positions = np.array(numbers, np.int64).T
        return DecodeRows(slots, positions, tokens, rotary_positions, [chunk.block_table for chunk in chunks])

    def pack(self, chunks: list[ScheduledChunk], min_rows: int) -> PackedBatch:
        """The chunks side by side, padded to ``min_rows`` with rows that write to scratch and attend to nothing."""
        block_size = self._block_size
        num_rows = max(min_rows, sum(chunk.num_tokens for chunk in chunks))
        ids = np.zeros(num_rows, np.int64)
        positions = np.zeros((4 if self.has_rotary_grid else 1, num_rows), np.int64)
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
            seen = ((), False) if layout is None else (layout.runs, layout.only_in_windows)
            spans.append(Span(row, chunk.num_tokens, end, chunk.block_table, *seen))
            if chunk.samples:
                logits_rows.append(end_row - 1)
            prompt_rows += [row + position - chunk.start for position in chunk.prompt_logprobs]
            row = end_row
        self.num_used_slots = max(self.num_used_slots, int(slots[:row].max(initial=-1)) + 1)
        logits_rows += prompt_rows
        logits_rows += [0] * (min_rows - len(logits_rows))
        device = self._last_tokens.device
        return PackedBatch(
            self._input_ids(ids, device_rows, device_slots),
            send(positions if len(positions) > 1 else positions[0], device),
            send(slots, device),
            send_list(logits_rows, torch.int64, device),
            spans,
            images if images.rows else None,
            slots=[chunk.slot for chunk in chunks],
            saves=[chunk.saves for chunk in chunks],
            wanted=logits_rows,
        )

    def _input_ids(self, ids: NDArray[np.int64], device_rows: list[int], device_slots: list[int]) -> Tensor:
        """``ids``, and in some rows what was sampled last for a slot; where that failed, any token."""
        device = self._last_tokens.device
        input_ids = send(ids, device)
        if device_rows:
            last = self._last_tokens.index_select(0, send_list(device_slots, torch.int64, device)).clamp_min_(0)
            input_ids.index_copy_(0, send_list(device_rows, torch.int64, device), last)
        return input_ids

    def _pack_images(
        self, layout: PromptLayout, chunk: ScheduledChunk, row: int, positions: NDArray[np.int64], found: ImageRows
    ) -> None:
        """A chunk of a sequence with images: its rotary positions, and what goes into the rows of ``found``."""
        assert self._images is not None
        end = chunk.start + chunk.num_tokens
        if layout.positions is not None:
            positions[1:, row : row + chunk.num_tokens] = layout.rotary_positions(chunk.start, end)
        with alone(chunk.slot):
            layout.add_rows(found, self._images.encoder.encode, row, chunk.start, end)


@contextmanager
def alone(slot: int) -> Iterator[None]:
    """What goes wrong with an image or a grammar goes wrong for its own sequence.

    An image's file is gone if its request has just been cancelled.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        raise SequenceFailed(slot) from error
