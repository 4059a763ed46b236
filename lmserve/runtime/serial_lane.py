"""The serial lane: models with an attention, or a cache, that is all their own.

Each sequence has the cache object that the model's own forward makes, and each forward is one sequence's, (1, L): its
prompt's chunk, or its newest token. A step goes through its sequences in turn, so that all get on alike. What stands in
the cache object is the model's affair; how much a token takes there is measured once. Nothing is shared between
sequences, and KV blocks only count.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmserve.runtime.interface import KEPT_STATE, NewSequence
from lmserve.runtime.packed_lane import PackedBatch, StepProgram, UnsupportedModel, in_order
from lmserve.runtime.transfer import send_list

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Under which forwards take and return what they keep."""
PROBE_TOKENS = (16, 48)
"""Lengths at which the cache is measured."""


@dataclass(slots=True)
class _Sequence:
    """What is kept of the owner of a slot."""

    token_ids: Tensor
    """Those that it came with, on the device."""
    cache: Any = None
    num_tokens: int = 0
    """That the cache has seen; -1: a forward failed, and it may be anything."""


class SerialLane:
    """Implements ``Lane``. Owns the cache objects."""

    name = "serial"
    program: StepProgram | None = None
    min_rows = 1

    def __init__(self, model: nn.Module) -> None:
        """Raises UnsupportedModel."""
        self.model: Any = model
        self.num_slots = 0
        """Tokens that a comparison with the stock forward may have; caches grow as they have to."""
        parameters = inspect.signature(self.model.forward).parameters
        names = [name for name in CACHE_NAMES if name in parameters]
        if not names or "input_ids" not in parameters:
            raise UnsupportedModel("its forward takes no cache")
        self._cache_name = names[0]
        self._keeps_logits = "logits_to_keep" in parameters
        self._sequences: dict[int, _Sequence] = {}

    def stock_attention(self) -> AbstractContextManager[None]:
        return nullcontext()

    def get_ready(self, num_used: int) -> bool:
        return False

    def measure(self) -> tuple[int, int]:
        """Bytes that a sequence's cache takes for each token, and whatever its length. Raises UnsupportedModel."""
        attention = str(getattr(self.model.config.get_text_config(), "_attn_implementation", ""))
        assert not attention.startswith("lmserve"), "another lane has left its attention behind"
        sizes = []
        for length in PROBE_TOKENS:
            ids = torch.zeros(1, length, dtype=torch.int64, device=self.model.device)
            cache = getattr(self.model(input_ids=ids, use_cache=True), self._cache_name, None)
            if cache is None:
                raise UnsupportedModel("its forward returns no cache")
            sizes.append(sum(_tensor_bytes(cache)))
        per_token = max(0, -(-(sizes[1] - sizes[0]) // (PROBE_TOKENS[1] - PROBE_TOKENS[0])))
        return per_token, max(0, sizes[0] - per_token * PROBE_TOKENS[0])

    def forget(self) -> None:
        """All that slots hold."""
        self._sequences = {}

    def begin(self, new_sequences: Sequence[NewSequence]) -> None:
        for new in new_sequences:
            tokens = torch.tensor(new.token_ids, device=self.model.device)
            before = self._sequences.get(new.slot)
            if new.state == KEPT_STATE and before is not None:
                before.token_ids = tokens
            else:
                self._sequences[new.slot] = _Sequence(tokens)

    def forward(self, batch: PackedBatch) -> Tensor:
        wanted = list(batch.wanted)
        parts: list[Tensor] = []
        order: list[int] = []
        for span, slot in zip(batch.spans, batch.slots, strict=True):
            sequence = self._sequences[slot]
            start = span.kv_len - span.q_len
            if sequence.num_tokens != start:  # a step that has failed left it elsewhere
                sequence.cache, sequence.num_tokens = None, 0
                if start:
                    self._run(sequence, sequence.token_ids[:start], [0])
            places = [i for i, row in enumerate(wanted) if span.row <= row < span.row + span.q_len]
            rows = [wanted[i] - span.row for i in places]
            logits = self._run(sequence, batch.input_ids[span.row : span.row + span.q_len], rows or [0])
            if places:
                parts.append(logits)
                order += places
        return in_order(parts, order)

    def _run(self, sequence: _Sequence, ids: Tensor, rows: list[int]) -> Tensor:
        cache, start = sequence.cache, sequence.num_tokens
        sequence.cache, sequence.num_tokens = None, -1
        kept = send_list(rows, torch.int64, ids.device)
        keep = {"logits_to_keep": kept} if self._keeps_logits else {}
        output = self.model(input_ids=ids[None], use_cache=True, **keep, **{self._cache_name: cache})
        sequence.cache, sequence.num_tokens = getattr(output, self._cache_name), start + len(ids)
        logits: Tensor = output.logits[0]
        return logits if keep else logits.index_select(0, kept)


def _tensor_bytes(found: Any, depth: int = 0) -> Iterator[int]:
    """Of all tensors within a cache object, each storage by what is visible of it."""
    if isinstance(found, Tensor):
        yield found.numel() * found.element_size()
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensor_bytes(value, depth + 1)
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _tensor_bytes(value, depth + 1)
    elif hasattr(found, "__dict__") and depth < 4:
        yield from _tensor_bytes(vars(found), depth + 1)
