"""KV blocks: who holds them, which are free, what the free ones still contain."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Owns ``num_blocks`` block ids, their reference counts, and the contents of full blocks by hash.

    A block is *used* while its reference count is positive. A free block may still be *cached*: its contents stay
    findable by hash until the block is handed out again. Free blocks are queued so that those without contents go
    first, then the least recently freed; a request's blocks are queued last block first, so that a chain loses its
    leaf before its root.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._free)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """``count`` blocks that the caller now holds, or None if there are not enough.

        Adjacent blocks are preferred (a CPU reads them in place): the one behind ``after``, or behind the last one
        given, if it is free and holds no contents worth keeping.
        """
        if count > len(self._free):
            return None
        blocks: list[int] = []
        last = after
        for _ in range(count):
            last = self._take_free(last)
            blocks.append(last)
        return blocks

    def find(self, block_hash: bytes) -> int | None:
        """The block with these contents, used or free."""
        return self._block_of.get(block_hash)

    def is_free(self, block: int) -> bool:
        return self._num_references[block] == 0

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block, the last block of the sequence first."""
        for block in reversed(blocks):
            assert self._num_references[block] > 0, f"block {block} is free already"
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, block_hash: bytes) -> None:
        """The used block now has the contents of this hash. If another block has them too, the first one is found."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """What the blocks hold is not to be found any more."""
        for block in blocks:
            known = self._hash_of[block]
            if known is not None:
                del self._block_of[known]
                self._hash_of[block] = None
                if block in self._free:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless every block is free, or held as often as the block tables say."""
        held = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            assert self._num_references[block] == held[block], f"block {block} has a wrong count"
            assert (block in self._free) == (held[block] == 0), f"block {block} is lost or free while used"
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, f"block {block} is found by a hash that is not its own"

    def _take_free(self, last: int | None) -> int:
        block = -1 if last is None else last + 1
        if block not in self._free or self._hash_of[block] is not None:
            block = next(iter(self._free))
        del self._free[block]
        self.forget((block,))
        self._num_references[block] = 1
        return block
