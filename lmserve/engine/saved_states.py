"""States of recurrent layers, saved where blocks end, so that a shared prefix need not be computed again.

Keys and values of a prefix can be shared as they lie; a recurrent state is overwritten by the next token. So copies are
kept in rows of the runner's, a bounded number, found by the hash of the block that they stand behind, like the block
itself. Where to save: at the last border of a prompt (the next turn of a chat goes on from there), where a prompt was
found to leave another one's (a shared instruction, from the second time on), and, replacing each other, where an answer
grows over a border. Which to forget: the least recently used. (Marconi, arXiv:2411.19379, has the idea of saving at the
points where prompts part.)
"""

from __future__ import annotations

from collections import OrderedDict

from lmserve.engine.block_pool import IntegrityError


class SavedStates:
    """Owns which of ``num_rows`` rows holds which state.

    A row is free, *promised* to a step that will fill it, or *filled*: found by its hash.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(reversed(range(num_rows)))
        self._promised: set[int] = set()
        self._row_of: OrderedDict[bytes, int] = OrderedDict()
        """The filled rows, the least recently used first."""

    def find(self, block_hash: bytes) -> int | None:
        """The row with the state behind this block."""
        return self._row_of.get(block_hash)

    def touch(self, block_hash: bytes) -> None:
        """The state is used."""
        self._row_of.move_to_end(block_hash)

    def promise(self, instead_of: bytes | None = None) -> int | None:
        """A row for a state to come; None if all are promised already. ``instead_of``: preferably that one's."""
        if instead_of is not None and instead_of in self._row_of:
            row = self._row_of.pop(instead_of)
        elif self._free:
            row = self._free.pop()
        elif self._row_of:
            row = self._row_of.popitem(last=False)[1]
        else:
            return None
        self._promised.add(row)
        return row

    def fill(self, row: int, block_hash: bytes) -> None:
        """The row now holds the state behind this block. If another does, too, that one stays the one found."""
        self._promised.remove(row)
        if block_hash in self._row_of:
            self._free.append(row)
        else:
            self._row_of[block_hash] = row

    def give_back(self, row: int) -> None:
        """The step that was to fill the row came to nothing."""
        self._promised.remove(row)
        self._free.append(row)

    def check_integrity(self, promised: set[int]) -> None:
        """Raises ``IntegrityError`` unless each row is in one place, and those promised are the given ones."""
        if promised != self._promised:
            raise IntegrityError(f"the rows {sorted(promised ^ self._promised)} of saved states are promised in vain")
        rows = [*self._free, *self._promised, *self._row_of.values()]
        if sorted(rows) != list(range(self.num_rows)):
            raise IntegrityError(f"rows of saved states were lost or given twice: {sorted(rows)}")
