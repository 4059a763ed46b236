"""One sequence that the engine works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from lmserve.sampling_params import SamplingParams


class RequestStatus(IntEnum):
    """Where a request is."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One choice of one request: its tokens, how many of them are computed, and where their keys and values lie.

    The ``n`` choices of a request are ``n`` of these; they share the list of prompt tokens, which nobody changes.
    """

    request_id: str
    choice: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    """Lower runs earlier."""
    arrival: int
    """Counts up over all choices of all requests of one engine."""
    cache_root: bytes = b""
    """Where the hash chain of its blocks begins: requests with different roots share no blocks."""

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were found in the cache when the request first ran; None before that."""
    slot: int | None = None
    """Row of per-sequence state in the runner, while running."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in the order of the tokens, while running. May hold more tokens than are computed."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks, computed or not. Extended by the ``KVCacheManager`` when it needs to know."""
    num_matched_blocks: int = 0
    """Where the search for a cached prefix last ended, while waiting. A hint: a block may have gone since."""

    rank: tuple[int, int] = field(init=False)
    """Order of service: a smaller one runs earlier and is preempted later. No two requests share one."""
    end_token_ids: frozenset[int] = field(init=False)
    """Tokens that end the sequence, once ``min_tokens`` are there."""

    def __post_init__(self) -> None:
        self.rank = (self.priority, self.arrival)
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset((*self.sampling.stop_token_ids, *eos))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """The tokens ``[start, end)`` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        output = self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        return self.prompt_token_ids[start:] + output
