"""The state lane: models whose layers carry a state from token to token (Mamba, gated delta rules, short convolutions).

Such layers cannot see where one packed sequence ends and the next begins. So a step is several forwards of the stock
model: each chunk of a prompt alone, (1, L), and all decodes together, (batch, 1). Their attention layers, if they have
any, are those of the packed lane, on the same paged cache; their states are gathered from rows, one for each slot, and
written back (``recurrent_state.py``).

A step may fail and be tried again. So what it made of the states is kept aside until the next one begins, which says
which sequences are told again: theirs is dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import FRESH_STATE, KEPT_STATE, NewSequence, StateSave
from lmserve.runtime.kv_cache import LayerShape
from lmserve.runtime.packed_lane import KNOWN_LAYERS, MIN_ROWS, PackedBatch, PackedLane, UnsupportedModel, in_order
from lmserve.runtime.recurrent_state import (
    StateKey,
    StateRows,
    States,
    StateShape,
    fill_cache,
    learn_shapes,
    new_cache,
    read_states,
    row_bytes,
)
from lmserve.runtime.transfer import send_list

PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of the step that are one forward: some of one prompt's, or one of each of several sequences."""

    rows: list[int]
    """A prompt's are adjacent."""
    spans: list[Span]
    """With their rows counted from the piece's first."""
    slots: list[int]
    is_batch: bool = False
    goes_on: bool = False
    """From where the piece before it has ended."""
    is_fresh: bool = False
    """A sequence begins here, with no state."""
    save_to: tuple[tuple[int, int], ...] = ()
    """(row of saved states, which of ``slots``), behind it."""


@dataclass(slots=True)
class _Outcome:
    """What a step has made of the states."""

    coming: dict[tuple[int, ...], States]
    """By slots."""
    to_save: list[tuple[int, States, int]]
    """Row of saved states, and which of these."""


class StateLane(PackedLane):
    """A packed lane whose steps are cut, and the owner of its sequences' states."""

    name = "state"
    known_layers = KNOWN_LAYERS | {"linear_attention", "conv", "hybrid", "hybrid_sliding", "moe"}

    def __init__(self, model: nn.Module, *, keeps_latents: bool = False) -> None:
        self.state_shapes: dict[StateKey, StateShape] = {}
        """Learnt by ``probe``."""
        self._rows: StateRows | None = None
        self._num_slots = 0
        self._outcome = _Outcome({}, [])
        super().__init__(model, keeps_latents=keeps_latents)
        self._text_config = self.model.config.get_text_config()

    def _check_forward(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        names = [name for name in ("past_key_values", "cache_params") if name in parameters]
        if not names or "input_ids" not in parameters:
            raise UnsupportedModel("its forward takes no cache")
        self._cache_name = names[0]
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self._takes_positions = "position_ids" in parameters or takes_any

    @property
    def min_rows(self) -> int:
        return 1  # a row more would be a token more; decodes are padded below

    @property
    def state_bytes(self) -> int:
        """Of one sequence's states."""
        return row_bytes(self.state_shapes)

    def probe(self) -> dict[int, LayerShape]:
        """Learns the shapes of attention layers and states. Raises UnsupportedModel."""
        self._set_implementation(self._name)
        tokens = torch.arange(PROBE_TOKENS, device=self.model.device)
        cache = new_cache(self._text_config)
        self._call({"input_ids": tokens[None]}, tokens[None], tokens[-1:], cache)
        self.state_shapes = learn_shapes(cache)
        if not self.shapes and not self.state_shapes:
            raise UnsupportedModel("it keeps nothing in transformers' cache object")
        self._check_layers()
        return self.shapes

    def make_rows(self, num_slots: int, num_saved: int) -> None:
        """Room for the states of so many sequences, and so many saved ones behind them."""
        self._num_slots = num_slots
        self._rows = StateRows(self.state_shapes, num_slots + num_saved, self.model.device)

    def forget(self) -> None:
        """All that slots hold."""
        self._outcome = _Outcome({}, [])

    def begin(self, new_sequences: Sequence[NewSequence]) -> None:
        """The last step's states move on, but for the sequences that are told again; then these take theirs."""
        assert self._rows is not None, "make_rows comes first"
        told = {sequence.slot: sequence.state for sequence in new_sequences}
        outcome, self._outcome = self._outcome, _Outcome({}, [])
        for slots, states in outcome.coming.items():
            which = [i for i, slot in enumerate(slots) if slot not in told]
            if which:
                self._rows.write([slots[i] for i in which], states, which)
        for row, states, i in outcome.to_save:
            self._rows.write([self._num_slots + row], states, [i])
        for slot, state in told.items():
            if state not in (FRESH_STATE, KEPT_STATE):
                self._rows.copy(self._num_slots + state, slot)

    def forward(self, batch: PackedBatch) -> Tensor:
        inputs = self._inputs(batch)
        deep, self._deep = self._deep, {}
        wanted = list(batch.wanted)
        parts: list[Tensor] = []
        order: list[int] = []
        outcome = _Outcome({}, [])
        states: States = {}
        for piece in _cut(batch):
            if not piece.goes_on:
                states = {} if piece.is_fresh else self._gather(piece)
            place_of = {row: i for i, row in enumerate(piece.rows)}
            places = [i for i, row in enumerate(wanted) if row in place_of]
            self._deep = {} if piece.is_batch else _cut_deep(deep, piece.rows)
            part, states = self._run(batch, piece, inputs, [place_of[wanted[i]] for i in places], states)
            if places:
                parts.append(part)
                order += places
            outcome.coming[tuple(piece.slots)] = states
            if piece.save_to:  # the next piece writes over what it goes on from
                kept = states if piece.is_batch else {key: tensor.clone() for key, tensor in states.items()}
                outcome.to_save += [(row, kept, i) for row, i in piece.save_to]
        self._outcome = outcome
        return in_order(parts, order)

    def _gather(self, piece: _Piece) -> States:
        assert self._rows is not None, "make_rows comes first"
        num_padded = max(0, MIN_ROWS - len(piece.slots)) if piece.is_batch else 0
        return self._rows.gather([*piece.slots, *piece.slots[:1] * num_padded])

    def _run(
        self, batch: PackedBatch, piece: _Piece, inputs: dict[str, Tensor], kept: list[int], states: States
    ) -> tuple[Tensor, States]:
        """The logits of the ``kept`` rows of a piece (if there are none, of any), and its states."""
        assert self._backend is not None, "attach comes first"
        device = batch.input_ids.device
        # Rows of padding repeat the first one, and write to scratch.
        num_padded = max(0, MIN_ROWS - len(piece.rows)) if piece.is_batch else 0
        rows = send_list([*piece.rows, *piece.rows[:1] * num_padded], torch.int64, device)
        slots = batch.slot_mapping.index_select(0, rows)
        slots[len(piece.rows) :] = self.num_slots
        positions = batch.positions.index_select(-1, rows)
        positions = positions[..., :, None] if piece.is_batch else positions[..., None, :]
        inputs = {name: x[0].index_select(0, rows) for name, x in inputs.items()}
        inputs = {name: x[:, None] if piece.is_batch else x[None] for name, x in inputs.items()}
        cache = new_cache(self._text_config)
        fill_cache(cache, states, self.state_shapes)
        with self._planned(self._backend.plan(piece.spans), slots):
            logits = self._call(inputs, positions, send_list(kept or [0], torch.int64, device), cache)
        return logits, self._checked(read_states(cache))

    def _call(self, inputs: dict[str, Tensor], positions: Tensor, kept: Tensor, cache: DynamicCache) -> Tensor:
        """(kept, vocab) logits of a prompt's rows, (1, L), or of a batch's, (B, 1)."""
        is_batch = positions.shape[-2] > 1
        keep = (
            {"logits_to_keep": kept.new_zeros(1) if is_batch else kept} if "logits_to_keep" in self._parameters else {}
        )
        where = {"position_ids": positions} if self._takes_positions else {}
        output = self.model(**inputs, **where, **keep, use_cache=True, **{self._cache_name: cache})
        logits: Tensor = output.logits[:, 0] if is_batch else output.logits[0]
        return logits if keep and not is_batch else logits.index_select(0, kept)

    def _forward(self, inputs: dict[str, Tensor], positions: Tensor, logits_rows: Tensor) -> Tensor:
        return self._call(inputs, positions, logits_rows, new_cache(self._text_config))

    def _checked(self, states: States) -> States:
        sizes = {key: tuple(tensor.shape[1:]) for key, tensor in states.items()}
        if sizes != {key: shape.size for key, shape in self.state_shapes.items()}:
            raise UnsupportedModel("its states change their shape with a prompt's length")
        return states


def _cut(batch: PackedBatch) -> Iterator[_Piece]:
    """The decodes as one piece, then each prompt's chunk, cut where its state is to be saved."""
    entries = list(zip(batch.spans, batch.slots, batch.saves, strict=True))
    decodes = [entry for entry in entries if entry[0].q_len == 1 and entry[0].kv_len > 1]
    if decodes:
        yield _Piece(
            [span.row for span, _, _ in decodes],
            [replace(span, row=i) for i, (span, _, _) in enumerate(decodes)],
            [slot for _, slot, _ in decodes],
            is_batch=True,
            save_to=tuple((save.row, i) for i, (_, _, saves) in enumerate(decodes) for save in saves),
        )
    for span, slot, saves in entries:
        if span.q_len > 1 or span.kv_len == 1:
            yield from _cut_chunk(span, slot, saves)


def _cut_chunk(span: Span, slot: int, saves: tuple[StateSave, ...]) -> Iterator[_Piece]:
    start = first = span.kv_len - span.q_len
    save_to = {save.num_tokens: save.row for save in saves}
    for end in sorted({*save_to, span.kv_len}):
        row = span.row + start - first
        yield _Piece(
            list(range(row, row + end - start)),
            [replace(span, row=0, q_len=end - start, kv_len=end)],
            [slot],
            goes_on=start > first,
            is_fresh=start == 0,
            save_to=((save_to[end], 0),) if end in save_to else (),
        )
        start = end


def _cut_deep(deep: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Of a step's deepstack features those of some rows."""
    if not deep:
        return {}
    mask = deep["visual_pos_masks"]
    before, within = int(mask[:, : rows[0]].sum()), mask[:, rows[0] : rows[-1] + 1]
    after = before + int(within.sum())
    return {
        "visual_pos_masks": within,
        "deepstack_visual_embeds": [features[before:after] for features in deep["deepstack_visual_embeds"]],
    }
