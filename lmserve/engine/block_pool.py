"""KV blocks: who holds them, which are free, and what the free ones still contain."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

HASH_BYTES = 16


class IntegrityError(Exception):
    """The engine's books do not balance: a bug of ours, and nothing built on them can be trusted."""


def hash_block(parent: bytes, token_ids: Sequence[int], image_contents: bytes = b"") -> bytes:
    """Name of a full block's contents: its tokens, its images and, through the parent's hash, everything before them.

    128 bits of BLAKE2b: nobody can make two prompts with one name, so none is ever served another's keys and values.
    """
    return blake2b(parent + array("i", token_ids).tobytes() + image_contents, digest_size=HASH_BYTES).digest()


class BlockPool:
    """Owns ``num_blocks`` block ids, their reference counts, and which block has the contents of which hash.

    A block is used while its reference count is positive, else free. A free block may still be *cached*: it is found by
    its hash until it is handed out again. The free blocks are queued: those without contents first, then the least
    recently freed. A table is released from its end, so that a chain loses its leaf before its root.
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

    def is_free(self, block: int) -> bool:
        """Whether nobody holds the block."""
        return self._num_references[block] == 0

    def find(self, block_hash: bytes) -> int | None:
        """The block with these contents, used or free."""
        return self._block_of.get(block_hash)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """``count`` blocks, each with one reference and no contents; None, and nothing changed, if there are too few.

        Adjacent blocks can be read without a copy on some devices. So the blocks right behind ``after`` come first if
        they are free and hold nothing worth keeping, and the others are in ascending order.
        """
        if count > len(self._free):
            return None
        adjacent: list[int] = []
        block = -1 if after is None else after + 1
        while after is not None and len(adjacent) < count and block in self._free and self._hash_of[block] is None:
            del self._free[block]
            adjacent.append(block)
            block += 1
        others = sorted(self._free.popitem(last=False)[0] for _ in range(count - len(adjacent)))
        for block in others:
            self._drop_contents(block)
        blocks = adjacent + others
        for block in blocks:
            self._num_references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One reference more for each block."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def release(self, table: Sequence[int]) -> None:
        """One reference less for each block of a table. Those that become free stay cached if they have contents."""
        for block in reversed(table):
            if self._num_references[block] == 0:
                raise IntegrityError(f"block {block} is released, but nobody holds it")
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def set_contents(self, block: int, block_hash: bytes) -> None:
        """The used block now has these contents for good. If another one has them too, that one stays the one found."""
        if self._block_of.setdefault(block_hash, block) == block:
            self._hash_of[block] = block_hash

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises ``IntegrityError`` unless each block is free or held as often as the tables say, and found rightly."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._num_references) if count}
        if counted != held:
            wrong = sorted(dict(counted.items() ^ held.items()))
            raise IntegrityError(f"the reference counts of blocks {wrong} differ from the block tables")
        if len(counted) + len(self._free) != self.num_blocks or not counted.keys().isdisjoint(self._free):
            raise IntegrityError(f"{len(counted)} used and {len(self._free)} free blocks, of {self.num_blocks}")
        num_known = self.num_blocks - self._hash_of.count(None)
        if len(self._block_of) != num_known or any(self._hash_of[b] != name for name, b in self._block_of.items()):
            raise IntegrityError("a block is found by a hash that is not its own")

    def _drop_contents(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
