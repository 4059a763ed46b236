"""Two ways through a stock transformers encoder: packed, and padded as transformers does it.

Packed, all inputs stand in one row of tokens, and only attention knows where one ends: it is a function of ours,
plugged in through transformers' interface, that attends within each block of equal lengths. Nothing is padded, so
nothing is computed in vain. A model whose attention is its own (MPNet has a position bias), or that needs its head (a
cross-encoder), goes the padded way.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
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


class PackedEncoderLane(EncoderLane):
    """All inputs in one row. Owns the plug between the model and our attention."""

    name: ClassVar[str] = "packed"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._blocks: list[Block] = []
        self._num_calls = 0
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

    def hidden_states(self, batch: EncoderBatch) -> Tensor:
        states = []
        for output, lengths in self.forwards(batch):
            states += [row[:length] for row, length in zip(output.last_hidden_state, lengths, strict=True)]
        return torch.cat(states)

    def forwards(self, batch: EncoderBatch) -> Iterator[tuple[Any, list[int]]]:
        """The model's outputs, and the lengths of the inputs in each, in the order of the batch."""
        # Several inputs at once need padding, and a decoder with a classification head says that it cannot tell it.
        can_pad = getattr(self.model.config, "pad_token_id", None) is not None
        lengths = batch.lengths
        ids, types = (torch.split(x, lengths) for x in (batch.input_ids, batch.token_type_ids))
        first = 0
        while first < len(lengths):
            end = first + 1
            while can_pad and end < len(lengths) and lengths[end] >= LEAST_FILL * lengths[first]:
                end += 1
            yield self._forward(ids[first:end], types[first:end]), lengths[first:end]
            first = end

    def _forward(self, ids: tuple[Tensor, ...], types: tuple[Tensor, ...]) -> Any:
        padding = getattr(self.model.config, "pad_token_id", None) or 0
        arguments: dict[str, Any] = {"attention_mask": _pad_rows([torch.ones_like(each) for each in ids], 0)}
        if "token_type_ids" in self._parameters:
            arguments["token_type_ids"] = _pad_rows(types, 0)
        return self.model(input_ids=_pad_rows(ids, padding), **arguments)


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
    return None if table is None else table.padding_idx


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that one input may have; None where the model does not say."""
    table = _position_table(model)
    if table is not None:
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _position_table(model: nn.Module) -> nn.Embedding | None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return module
    return None


def _pad_rows(rows: tuple[Tensor, ...] | list[Tensor], padding: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=padding)
