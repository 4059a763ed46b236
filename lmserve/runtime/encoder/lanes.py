"""Three ways through a stock transformers encoder: packed, padded as transformers does it, and one by one.

Packed, all inputs stand in one row of tokens, and only attention knows where one ends: it is a function of ours,
plugged in through transformers' interface, that attends within each block of equal lengths. Nothing is padded, so
nothing is computed in vain. A model whose attention is its own (MPNet has a position bias), or that needs its head (a
cross-encoder), goes the padded way. Some leave padding's mask out (FNet, ConvBERT): their texts go one by one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from lmserve.runtime.attention.base import LayerOptions, dense_attention
from lmserve.runtime.encoder.batch import Block, EncoderBatch
from lmserve.runtime.packed_lane import UnsupportedModel

LEAST_FILL = 0.8
"""Inputs shorter than this share of the longest one are not padded to it: they get a forward of their own."""


class EncoderLane(ABC):
    """A model's way from tokens to their vectors."""

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self._parameters = frozenset(inspect.signature(self.model.forward).parameters)

    @abstractmethod
    def hidden_states(self, batch: EncoderBatch) -> Tensor:
        """(T, hidden size) in the model's dtype: the last layer's output for each of the batch's rows."""


class _Reached(Exception):
    """A row has come as far as the first layer that attends."""


class PackedEncoderLane(EncoderLane):
    """All inputs in one row. Owns the plug between the model and our attention."""

    name: ClassVar[str] = "packed"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._blocks: list[Block] = []
        self._num_calls = 0
        self._only_begins = False
        self._masks: dict[tuple[int, int, bool], Tensor] = {}
        self._padding_position = padding_position(model)
        # transformers reads meaning from names: "flash", "sdpa" and a slash must not be in it.
        self._name = f"lmserve_encoder_{id(self):x}"
        self._stock = str(self.model.config._attn_implementation)
        if not {"input_ids", "position_ids"} <= self._parameters:
            raise UnsupportedModel("its forward takes no position_ids, so packed inputs cannot be told apart")
        AttentionInterface.register(self._name, self._attention)
        self.model.set_attn_implementation(self._name)

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """The model as transformers made it."""
        self.model.set_attn_implementation(self._stock)
        try:
            yield
        finally:
            self.model.set_attn_implementation(self._name)

    def give_back(self) -> None:
        """The model is as transformers made it again: it takes another lane."""
        self.model.set_attn_implementation(self._stock)

    def try_row(self, batch: EncoderBatch) -> None:
        """As far as the first attention: there is where a model counts a row's tokens, and takes them for one text's.

        Raises:
            Exception: what the model raises, if the row is too long for it.
        """
        self._only_begins = True
        try:
            with suppress(_Reached):
                self.hidden_states(batch)
        finally:
            self._only_begins = False

    def hidden_states(self, batch: EncoderBatch) -> Tensor:
        self._blocks, self._num_calls = batch.blocks, 0
        num_rows = batch.input_ids.numel()
        padding = (0, padded_rows(num_rows) - num_rows)
        arguments: dict[str, Any] = {"position_ids": pad(self._positions(batch), padding)[None]}
        if "token_type_ids" in self._parameters:
            arguments["token_type_ids"] = pad(batch.token_type_ids, padding)[None]
        if "use_cache" in self._parameters:
            arguments["use_cache"] = False
        try:
            states: Tensor = self.model(input_ids=pad(batch.input_ids, padding)[None], **arguments).last_hidden_state
        finally:
            self._masks.clear()
        if not self._num_calls:
            raise UnsupportedModel("its attention does not go through transformers' attention interface")
        return states[0, :num_rows]

    def _positions(self, batch: EncoderBatch) -> Tensor:
        """(T,), as the model would number them itself: some skip padding's token, which a text may hold, too."""
        if self._padding_position is None:
            return batch.positions
        counts = batch.input_ids != self._padding_position
        running = counts.cumsum(0)
        begins = torch.arange(counts.numel(), device=counts.device) - batch.positions
        return (running - (running - counts.long())[begins]) * counts + self._padding_position

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """query (1, heads, T, Dk), key and value (1, kv heads, T, D) -> ((1, T, heads, Dv), None): their contract."""
        if attention_mask is not None or arguments.get("position_bias") is not None:
            raise UnsupportedModel("its layers bring an attention mask or a position bias of their own")
        if self._only_begins:
            raise _Reached
        self._num_calls += 1
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        options = LayerOptions(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])  # the rows behind the last block attend to nothing
        for block in self._blocks:
            shape = (block.count, block.length)
            q_part, k_part, v_part = (x[block.rows].view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            attended = self._attend(q_part, k_part, v_part, block.length, causal, options)
            out[block.rows] = attended.transpose(1, 2).flatten(0, 1)
        return out[None], None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, length: int, causal: bool, options: LayerOptions) -> Tensor:
        """(count, heads, length, D) each."""
        window = options.window if options.window is not None and options.window < length else None
        if options.needs_dense:
            return dense_attention(q, k, v, self._mask(length, window, causal, q.device)[None, None], options)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if window is None:
            return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=options.scaling)
        mask = self._mask(length, window, causal, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scaling)

    def _mask(self, length: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
        """(length, length) bool: which keys a query sees; the layers of one forward share them."""
        found = self._masks.get((length, window or 0, causal))
        if found is None:
            i = torch.arange(length, device=device)
            distance = i[:, None] - i
            found = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            if window is not None:
                found = found & (distance.abs() < window)
            self._masks[length, window or 0, causal] = found
        return found


class PaddedEncoderLane(EncoderLane):
    """Inputs of like length in one stock forward each, with transformers' own masks."""

    name: ClassVar[str] = "padded"
    pads: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # Without its number, a decoder with a classification head says that it cannot tell padding.
        if self.pads and getattr(model.config, "pad_token_id", None) is None:
            raise UnsupportedModel("its configuration names no token for padding")

    def hidden_states(self, batch: EncoderBatch) -> Tensor:
        states = []
        for output, lengths in self.forwards(batch):
            states += [row[:length] for row, length in zip(output.last_hidden_state, lengths, strict=True)]
        return torch.cat(states)

    def forwards(self, batch: EncoderBatch) -> Iterator[tuple[Any, list[int]]]:
        """The model's outputs, and the lengths of the inputs in each, in the order of the batch."""
        lengths = batch.lengths
        ids, types = (torch.split(x, lengths) for x in (batch.input_ids, batch.token_type_ids))
        first = 0
        while first < len(lengths):
            end = first + 1
            while self.pads and end < len(lengths) and lengths[end] >= LEAST_FILL * lengths[first]:
                end += 1
            yield self._forward(ids[first:end], types[first:end]), lengths[first:end]
            first = end

    def _forward(self, ids: tuple[Tensor, ...], types: tuple[Tensor, ...]) -> Any:
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        arguments: dict[str, Any] = {"attention_mask": _pad_rows([torch.ones_like(each) for each in ids], 0)}
        # XLM takes no types for something else than types that are all 0.
        if "token_type_ids" in self._parameters and any(bool(each.any()) for each in types):
            arguments["token_type_ids"] = _pad_rows(types, 0)
        return self.model(input_ids=_pad_rows(ids, padding), **arguments)


class SingleEncoderLane(PaddedEncoderLane):
    """Each input in a forward of its own."""

    name: ClassVar[str] = "single"
    pads: ClassVar[bool] = False


def padded_rows(num_rows: int) -> int:
    """With the rows that are added: oneDNN makes and keeps a kernel for each number of rows that it meets, which takes
    its time and, over some hundreds of steps, as much memory as the weights."""
    step = 32 if num_rows > 32 else 8
    return -(-num_rows // step) * step


def padding_position(model: nn.Module) -> int | None:
    """RoBERTa and its kin count positions from padding's number on, which is also the position of each padding token.

    None: positions count from 0, whatever the tokens are.
    """
    table = _position_table(model)
    return None if table is None else table[1]


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that one input may have; None where the model does not say."""
    table, config = _position_table(model), model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), _full_attention(config)]
    if table is not None:  # it may have rows that no text gets to
        limits.append(table[0] - (0 if table[1] is None else table[1] + 1))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _full_attention(config: Any) -> int | None:
    """BigBird attends to everything up to so many tokens, and after one such text to whatever comes, for good: what a
    longer one's vector is would depend on what has come before it."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)


def _position_table(model: nn.Module) -> tuple[int, int | None] | None:
    """(its rows, the number of padding's), of whatever class: I-BERT's is its own."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(getattr(module, "weight", None), Tensor):
            return len(module.weight), getattr(module, "padding_idx", None)
    return None


def _pad_rows(rows: tuple[Tensor, ...] | list[Tensor], padding: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=padding)
