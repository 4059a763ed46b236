"""One sequence that the engine is working on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b

import numpy as np

from lmserve.sampling_params import SamplingParams

HASH_BYTES = 16


class RequestStatus(IntEnum):
    """Where a request is."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one request: its tokens, how many of them are computed, and where their keys and values are.

    There is no prefill and no decode: ``num_computed_tokens`` catches up with ``num_tokens``, and each time it has,
    one more token is sampled.
    """

    request_id: str
    choice: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    """Tokens that end it: its own stop tokens, and the model's end-of-sequence unless that is ignored."""
    eos_token_ids: tuple[int, ...]
    priority: int
    arrival: int
    """Counts up over all requests of the engine."""
    salt: bytes
    """Root of the hash chain: requests with different salts share no blocks."""
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)
    """Prompt and output."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache when it was first admitted."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks, computed or not."""
    slot: int | None = None
    was_admitted: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller runs earlier and is preempted later."""
        return (self.priority, self.arrival)

    def hash_full_blocks(self, block_size: int) -> None:
        """Extends ``block_hashes`` to all full blocks.

        Each hash covers the block's tokens and, through its parent's hash, everything before it: equal hashes mean
        equal prefixes (128 bits of BLAKE2b).
        """
        first = len(self.block_hashes) * block_size
        while first + block_size <= len(self.token_ids):
            parent = self.block_hashes[-1] if self.block_hashes else self.salt
            tokens = np.array(self.token_ids[first : first + block_size], np.int32).tobytes()
            self.block_hashes.append(blake2b(parent + tokens, digest_size=HASH_BYTES).digest())
            first += block_size
