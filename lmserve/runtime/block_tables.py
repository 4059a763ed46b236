"""The block tables of all slots, kept on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.transfer import send


class BlockTables:
    """A table for each slot and one for padding, and what the host has told the device of them.

    A sequence's table only grows while it keeps its slot, so that a step of decodes has one new entry a row at the
    most. What stands beyond the entries that a sequence needs is of no sequence: the scratch block, or an earlier
    owner's.

    Attributes:
        blocks: (slots + 1, width) int32. The last row is padding's: the scratch block everywhere.
        padding: the number of that row.
    """

    def __init__(self, num_slots: int, width: int, scratch_block: int, device: torch.device) -> None:
        self.blocks = torch.full((num_slots + 1, width), scratch_block, dtype=torch.int32, device=device)
        self.padding = num_slots
        self._width = width
        self._scratch_block = scratch_block
        self._num_known = np.zeros(num_slots, np.int64)

    @property
    def no_entry(self) -> tuple[int, int]:
        """What a row without a new entry has to ``write``: its place and its block."""
        return self.padding * self._width, self._scratch_block

    def forget(self, slot: int) -> None:
        """The slot has a new owner."""
        self._num_known[slot] = 0

    def learn(
        self, slots: NDArray[np.int64], num_blocks: NDArray[np.int64], tables: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The new entry of each row, which has to be written on the device before the tables are read: (rows,) places,
        (rows,) blocks. Where a row lacks more than one, those before it are sent at once.

        Args:
            slots: (rows,), each at most once.
            num_blocks: (rows,), how many entries of its table a row needs.
            tables: each row's, with so many entries or more.
        """
        places = np.full(len(slots), self.no_entry[0], np.int64)
        blocks = np.full(len(slots), self.no_entry[1], np.int64)
        known = self._num_known[slots]
        lacking = np.flatnonzero(known < num_blocks)
        earlier: list[tuple[int, int]] = []
        for row in lacking.tolist():
            first, last = int(slots[row]) * self._width, int(num_blocks[row]) - 1
            earlier += [(first + i, tables[row][i]) for i in range(known[row], last)]
            places[row], blocks[row] = first + last, tables[row][last]
        if earlier:
            self.write(*send(np.array(earlier, np.int64).T.copy(), self.blocks.device))
        self._num_known[slots[lacking]] = num_blocks[lacking]
        return places, blocks

    def write(self, places: Tensor, blocks: Tensor) -> None:
        """Puts entries, (any,) int64 both, into the tables. What it reads and writes is on the device."""
        self.blocks.view(-1).index_copy_(0, places, blocks.to(torch.int32))

    def look_up(self, rows: Tensor, entries: Tensor) -> Tensor:
        """(any,) int64: entry ``entries[i]`` of table ``rows[i]``, on the device."""
        return self.blocks.view(-1).index_select(0, rows * self._width + entries).to(torch.int64)
