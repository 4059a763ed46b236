"""Requests and their KV blocks."""

from __future__ import annotations

from collections.abc import Iterable

from lmserve.engine.block_pool import BlockPool
from lmserve.engine.request import Request


class KVCacheManager:
    """Gives requests blocks, finds shared prefixes, takes blocks back. Hides the pool from the scheduler.

    A full block is findable once the step that computed it is over (``register_computed``). While a running request is
    still computing a block that others will want, its hash is *pending*: who wants it does better to wait.
    """

    def __init__(self, num_blocks: int, block_size: int, *, keeps_contents: bool = True) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._keeps_contents = keeps_contents
        self._pending: dict[bytes, Request] = {}

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def capacity(self) -> int:
        """Tokens that one request alone could have."""
        return self._pool.num_blocks * self.block_size

    def admit(self, request: Request) -> bool:
        """Blocks for all known tokens, cached ones first; sets ``num_computed_tokens``. False: nothing has changed."""
        assert not request.block_table
        request.hash_full_blocks(self.block_size)
        cached = self._cached_prefix(request)
        total = -(-request.num_tokens // self.block_size)
        num_new = total - len(cached)
        if num_new > self._pool.num_free - sum(self._pool.is_free(block) for block in cached):
            return False
        self._pool.share(cached)
        new = self._pool.allocate(num_new, after=cached[-1] if cached else None)
        assert new is not None
        request.block_table = cached + new
        request.num_computed_tokens = len(cached) * self.block_size
        for block_hash in request.block_hashes[len(cached) :]:
            self._pending.setdefault(block_hash, request)
        return True

    def grow(self, request: Request) -> bool:
        """Makes sure that there is room for all tokens; False if no block is left."""
        if request.num_tokens <= len(request.block_table) * self.block_size:
            return True
        new = self._pool.allocate(1, after=request.block_table[-1])
        if new is None:
            return False
        request.block_table += new
        return True

    def is_being_computed(self, request: Request) -> bool:
        """Whether a running request is computing the first block that this waiting one would miss."""
        request.hash_full_blocks(self.block_size)
        usable = self._num_shareable(request)
        for block_hash in request.block_hashes[:usable]:
            if self._pool.find(block_hash) is None:
                return block_hash in self._pending
        return False

    def register_computed(self, request: Request, num_before: int) -> None:
        """The step that took the request on from ``num_before`` computed tokens is over: full blocks can be found."""
        request.hash_full_blocks(self.block_size)
        for i in range(num_before // self.block_size, request.num_computed_tokens // self.block_size):
            block_hash = request.block_hashes[i]
            self._pool.remember(request.block_table[i], block_hash)
            if self._pending.get(block_hash) is request:
                del self._pending[block_hash]

    def free(self, request: Request) -> None:
        """Takes the request's blocks back; full computed ones stay findable unless prefix caching is off."""
        for block_hash in request.block_hashes:
            if self._pending.get(block_hash) is request:
                del self._pending[block_hash]
        self._pool.release(request.block_table)
        if not self._keeps_contents:
            self._pool.forget(block for block in request.block_table if self._pool.is_free(block))
        request.block_table = []
        request.num_computed_tokens = 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError if a block was lost, freed twice or is held by nobody."""
        self._pool.check_integrity(request.block_table for request in requests)

    def _num_shareable(self, request: Request) -> int:
        """Full blocks that leave at least one token to compute: its logits are wanted."""
        return min(len(request.block_hashes), (request.num_tokens - 1) // self.block_size)

    def _cached_prefix(self, request: Request) -> list[int]:
        blocks = []
        for block_hash in request.block_hashes[: self._num_shareable(request)]:
            block = self._pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks
