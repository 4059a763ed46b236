"""Requests and their KV blocks."""

from __future__ import annotations

from collections.abc import Iterable

from lmserve.engine.block_pool import BlockPool, IntegrityError, hash_block
from lmserve.engine.request import Request


class KVCacheManager:
    """Gives requests blocks, finds the prefixes that they share, takes blocks back. Hides the pool from the scheduler.

    Full blocks are found by a hash chain, as in vLLM's automatic prefix caching. A block can be found once the step
    that computed it is over. Before that its hash is *pending* with the running request that will compute it, and
    whoever wants it does better to wait for it than to compute it twice.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._pending: dict[bytes, Request] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had at once, cached ones included."""
        return self._pool.num_free

    @property
    def max_tokens(self) -> int:
        """Tokens that one request alone can have."""
        return self._pool.num_blocks * self.block_size

    def prefix_is_pending(self, request: Request) -> bool:
        """Whether a running request is about to compute the first block that this waiting one would miss."""
        first = self._first_missing_block(request)
        return first < self._num_shareable(request) and request.block_hashes[first] in self._pending

    def num_missing_tokens(self, request: Request) -> int:
        """Tokens that a waiting request would have to compute: those behind its cached prefix."""
        return request.num_tokens - self._first_missing_block(request) * self.block_size

    def admit(self, request: Request, num_spare: int = 0) -> bool:
        """Blocks for all known tokens, shared ones first, and ``num_computed_tokens`` to match.

        False, and nothing changed, if there would be fewer than ``num_spare`` free blocks left.
        """
        assert not request.block_table
        self.hash_full_blocks(request)
        shared = self._find_prefix(request)
        num_new = -(-request.num_tokens // self.block_size) - len(shared)
        num_available = self._pool.num_free - sum(map(self._pool.is_free, shared))
        if num_new + num_spare > num_available:
            return False
        self._pool.share(shared)
        new = self._pool.allocate(num_new, after=shared[-1] if shared else None)
        assert new is not None
        request.block_table = shared + new
        request.num_computed_tokens = request.num_launched_tokens = len(shared) * self.block_size
        request.num_matched_blocks = 0
        for block_hash in request.block_hashes[len(shared) :]:
            self._pending.setdefault(block_hash, request)
        return True

    def grow(self, request: Request) -> bool:
        """Room for the newest token of a running request; False if there is no free block for it."""
        if request.num_tokens + request.num_coming_tokens <= len(request.block_table) * self.block_size:
            return True
        new = self._pool.allocate(1, after=request.block_table[-1])
        if new is None:
            return False
        request.block_table += new
        return True

    def register_computed(self, request: Request, num_computed_before: int) -> None:
        """The step that began at ``num_computed_before`` tokens is over: the blocks that it filled can be found."""
        first, end = num_computed_before // self.block_size, request.num_computed_tokens // self.block_size
        if first == end:
            return
        self.hash_full_blocks(request)
        for i in range(first, end):
            self._pool.set_contents(request.block_table[i], request.block_hashes[i])
            self._forget_pending(request, request.block_hashes[i])

    def free(self, request: Request) -> None:
        """Takes the request's blocks back. What is computed stays to be found until the blocks are needed."""
        for block_hash in request.block_hashes[request.num_computed_tokens // self.block_size :]:
            self._forget_pending(request, block_hash)
        self._pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = request.num_launched_tokens = 0

    def hash_full_blocks(self, request: Request) -> None:
        """Extends ``block_hashes`` to all full blocks of the request's tokens."""
        hashes = request.block_hashes
        parent = hashes[-1] if hashes else request.cache_root
        for start in range(len(hashes) * self.block_size, request.num_tokens - self.block_size + 1, self.block_size):
            end = start + self.block_size
            parent = hash_block(parent, request.token_ids(start, end), request.image_contents(start, end))
            hashes.append(parent)

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raises ``IntegrityError`` if a block was lost or freed twice, or is waited for in vain."""
        running = list(running)
        self._pool.check_integrity(request.block_table for request in running)
        if not set(self._pending.values()) <= set(running):
            raise IntegrityError("a block is pending with a request that does not run")

    def _first_missing_block(self, request: Request) -> int:
        self.hash_full_blocks(request)
        num_shareable = self._num_shareable(request)
        first = request.num_matched_blocks
        while first < num_shareable and self._pool.find(request.block_hashes[first]) is not None:
            first += 1
        request.num_matched_blocks = first
        return first

    def _num_shareable(self, request: Request) -> int:
        """Full blocks of tokens that may come from the cache instead of being computed."""
        return request.num_skippable_tokens // self.block_size

    def _find_prefix(self, request: Request) -> list[int]:
        blocks: list[int] = []
        for block_hash in request.block_hashes[: self._num_shareable(request)]:
            block = self._pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _forget_pending(self, request: Request, block_hash: bytes) -> None:
        if self._pending.get(block_hash) is request:
            del self._pending[block_hash]
