"""Requests and their KV blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lmserve.engine.block_pool import BlockPool, IntegrityError, hash_block
from lmserve.engine.request import Request
from lmserve.engine.saved_states import SavedStates
from lmserve.runtime.interface import FRESH_STATE, ScheduledChunk, StateSave


class KVCacheManager:
    """Gives requests blocks, finds the prefixes that they share, takes blocks back. Hides the pool from the scheduler.

    Full blocks are found by a hash chain, as in vLLM's automatic prefix caching. A block can be found once the step
    that computed it is over. Before that its hash is *pending* with the running request that will compute it, and
    whoever wants it does better to wait for it than to compute it twice.

    Of a model with recurrent states a prefix is shared up to where a state was saved, too (``saved_states.py``).
    """

    def __init__(self, num_blocks: int, block_size: int, num_saved_states: int | None = None) -> None:
        """``num_saved_states``: None where the model has no such states (``RunnerInfo``)."""
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._pending: dict[bytes, Request] = {}
        self._states = None if num_saved_states is None else SavedStates(num_saved_states)

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
        if self._states is not None and self._states.num_rows == 0:
            return False  # it will compute the block itself in any case
        first = self._first_missing_block(request)
        return first < self._num_shareable(request) and request.block_hashes[first] in self._pending

    def num_missing_tokens(self, request: Request) -> int:
        """Tokens that a waiting request would have to compute: those behind its cached prefix."""
        return request.num_tokens - self._num_with_state(request, self._first_missing_block(request)) * self.block_size

    def admit(self, request: Request, num_spare: int = 0) -> bool:
        """Blocks for all known tokens, shared ones first, and ``num_computed_tokens`` to match.

        False, and nothing changed, if there would be fewer than ``num_spare`` free blocks left.
        """
        assert not request.block_table
        self.hash_full_blocks(request)
        found = self._find_prefix(request)
        shared = found[: self._num_with_state(request, len(found))]
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
        if self._states is not None:
            self._begin_with_state(self._states, request, len(shared), len(found))
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

    def with_saves(self, request: Request, chunk: ScheduledChunk) -> ScheduledChunk:
        """The chunk, and where in it states are to be saved. The rows are the request's until the step is over."""
        if self._states is None:
            return chunk
        start, end = chunk.start, chunk.start + chunk.num_tokens
        saves = []
        for num_tokens in self._places_to_save(request, start, end):
            is_of_answer = num_tokens > request.num_prompt_tokens
            row = self._states.promise(instead_of=request.answer_state if is_of_answer else None)
            if row is not None:
                saves.append(StateSave(num_tokens, row))
        request.saves += saves
        return replace(chunk, saves=tuple(saves)) if saves else chunk

    def register_computed(self, request: Request, num_computed_before: int) -> None:
        """The step that began at ``num_computed_before`` tokens is over: the blocks that it filled can be found."""
        first, end = num_computed_before // self.block_size, request.num_computed_tokens // self.block_size
        if first == end:
            return
        self.hash_full_blocks(request)
        for i in range(first, end):
            self._pool.set_contents(request.block_table[i], request.block_hashes[i])
            self._forget_pending(request, request.block_hashes[i])
        if self._states is not None:
            self._fill_states(self._states, request)

    def free(self, request: Request) -> None:
        """Takes the request's blocks back. What is computed stays to be found until the blocks are needed."""
        for block_hash in request.block_hashes[request.num_computed_tokens // self.block_size :]:
            self._forget_pending(request, block_hash)
        self._pool.release(request.block_table)
        for save in request.saves:
            assert self._states is not None
            self._states.give_back(save.row)
        request.saves = []
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
        if self._states is not None:
            self._states.check_integrity({save.row for request in running for save in request.saves})

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

    def _num_with_state(self, request: Request, num_blocks: int) -> int:
        """So many of the blocks that a request finds are of use: all, or those up to the last saved state."""
        if self._states is None:
            return num_blocks
        while num_blocks > 0 and self._states.find(request.block_hashes[num_blocks - 1]) is None:
            num_blocks -= 1
        return num_blocks

    def _begin_with_state(self, states: SavedStates, request: Request, num_shared: int, num_found: int) -> None:
        request.state, request.parted_at = FRESH_STATE, 0
        if num_shared:
            block_hash = request.block_hashes[num_shared - 1]
            row = states.find(block_hash)
            assert row is not None
            request.state = row
            states.touch(block_hash)
        if num_found > num_shared:
            request.parted_at = num_found * self.block_size

    def _places_to_save(self, request: Request, start: int, end: int) -> list[int]:
        """Numbers of tokens in (start, end], at borders of blocks."""
        last = (request.num_prompt_tokens - 1) // self.block_size * self.block_size
        places = {request.parted_at, last}
        if start >= request.num_prompt_tokens and end % self.block_size == 0:
            places.add(end)
        return sorted(place for place in places if start < place <= end)

    def _fill_states(self, states: SavedStates, request: Request) -> None:
        computed = [save for save in request.saves if save.num_tokens <= request.num_computed_tokens]
        for save in computed:
            block_hash = request.block_hashes[save.num_tokens // self.block_size - 1]
            states.fill(save.row, block_hash)
            if save.num_tokens > request.num_prompt_tokens:
                request.answer_state = block_hash
        request.saves = [save for save in request.saves if save not in computed]

    def _forget_pending(self, request: Request, block_hash: bytes) -> None:
        if self._pending.get(block_hash) is request:
            del self._pending[block_hash]
