"""A step's inputs side by side: sorted, so that inputs of equal length are neighbours and become a dense block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lmserve.runtime.interface import EncoderInput


@dataclass(frozen=True, slots=True)
class Block:
    """The rows ``[row, row + count * length)``: ``count`` inputs of the same length."""

    row: int
    count: int
    length: int
    num_prompt_tokens: int
    """At the beginning of each, of an instruction."""

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count * self.length)


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """T tokens of the inputs in ``order``, longest first."""

    input_ids: Tensor
    """(T,) int64"""
    positions: Tensor
    """(T,) int64, from 0 in each input"""
    token_type_ids: Tensor
    """(T,) int64"""
    blocks: list[Block]
    order: list[int]
    """Which of the inputs comes first, second, …"""

    @property
    def lengths(self) -> list[int]:
        """Of each input, in the order of the rows."""
        return [block.length for block in self.blocks for _ in range(block.count)]


def make_batch(inputs: Sequence[EncoderInput], device: torch.device) -> EncoderBatch:
    """Side by side on the device."""

    def shape(index: int) -> tuple[int, int]:
        return -len(inputs[index].token_ids), inputs[index].num_prompt_tokens

    order = sorted(range(len(inputs)), key=shape)
    blocks, row = [], 0
    for (negative_length, num_prompt_tokens), members in groupby(order, key=shape):
        blocks.append(Block(row, len(list(members)), -negative_length, num_prompt_tokens))
        row = blocks[-1].rows.stop
    ids = [token_id for index in order for token_id in inputs[index].token_ids]
    types = [kind for index in order for kind in inputs[index].token_type_ids or [0] * len(inputs[index].token_ids)]
    positions = torch.cat([torch.arange(block.length).repeat(block.count) for block in blocks])
    return EncoderBatch(
        torch.tensor(ids, dtype=torch.int64).to(device),
        positions.to(device),
        torch.tensor(types, dtype=torch.int64).to(device),
        blocks,
        order,
    )
