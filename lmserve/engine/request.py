"""One sequence that the engine works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from lmserve.runtime.interface import FRESH_STATE, PromptImage, StateSave
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
    images: tuple[PromptImage, ...] = ()
    """Of the prompt, in its order."""
    grammar: str = ""
    """What the output has to be, for the runner; empty for anything."""
    cache_root: bytes = b""
    """Where the hash chain of its blocks begins: requests with different roots share no blocks."""

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Leading tokens whose keys and values are in the cache."""
    num_launched_tokens: int = 0
    """The same, and those that a step on its way computes: where the next chunk begins."""
    num_coming_tokens: int = 0
    """Tokens that steps on their way sample, and that are to be computed in their turn."""
    num_steps_in_flight: int = 0
    """Steps on their way that it has a part in. It may have ended, or gone back to the queue, since."""
    num_prompt_logprobs: int = 0
    """Leading positions whose next prompt token's log-probability has been reported. A preemption keeps it."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were found in the cache when the request first ran; None before that."""
    slot: int | None = None
    """Row of per-sequence state in the runner, while running."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in the order of the tokens, while running. May hold more tokens than are computed."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks, computed or not. Extended by the ``KVCacheManager`` when it needs to know."""
    state: int = FRESH_STATE
    """The row of saved states that it began with when it last took a slot."""
    parted_at: int = 0
    """Tokens that it had in common with what was cached when it last took a slot, but for which no state was saved."""
    saves: list[StateSave] = field(default_factory=list)
    """Those that steps on their way make, while running."""
    answer_state: bytes = b""
    """The block behind which the state of its growing answer was last saved."""
    num_hold_ups: int = 0
    """Steps of full length that its decoding has waited for, for others' prompts."""
    is_paused: bool = False
    """Whoever reads its output is slow: it is not served until it is resumed."""
    num_matched_blocks: int = 0
    """Where the search for a cached prefix last ended, while waiting. A hint: a block may have gone since."""

    rank: tuple[int, int] = field(init=False)
    """Order of service: a smaller one runs earlier and is preempted later. No two requests share one."""
    num_prompt_logprobs_wanted: int = field(init=False)
    """Of the ``n`` choices the first reports for all: their prompt is the same."""
    end_token_ids: frozenset[int] = field(init=False)
    """Tokens that end the sequence, once ``min_tokens`` are there."""

    def __post_init__(self) -> None:
        self.rank = (self.priority, self.arrival)
        wants_prompt_logprobs = self.sampling.prompt_logprobs is not None and self.choice == 0
        self.num_prompt_logprobs_wanted = self.num_prompt_tokens - 1 if wants_prompt_logprobs else 0
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        self.end_token_ids = frozenset((*self.sampling.stop_token_ids, *eos))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that no step has been told to compute yet, those that are on their way to be known included."""
        return self.num_tokens + self.num_coming_tokens - self.num_launched_tokens

    def land(self, has_sampled: bool) -> None:
        """A step that it had a part in is over, whatever came of it."""
        self.num_steps_in_flight = max(0, self.num_steps_in_flight - 1)  # 0 where steps are never launched ahead
        if has_sampled:
            self.num_coming_tokens = max(0, self.num_coming_tokens - 1)

    @property
    def num_skippable_tokens(self) -> int:
        """Leading tokens that need not be computed if they are found in the cache.

        All but the last, whose logits are wanted; and none whose prompt log-probability is still to be reported.
        """
        if self.num_prompt_logprobs < self.num_prompt_logprobs_wanted:
            return self.num_prompt_logprobs
        return self.num_tokens - 1

    def unreported(self, start: int, end: int) -> range:
        """The positions in ``[start, end)`` whose next prompt token's log-probability is still to be reported."""
        return range(max(start, self.num_prompt_logprobs), min(end, self.num_prompt_logprobs_wanted))

    def image_contents(self, start: int, end: int) -> bytes:
        """What the tokens ``[start, end)`` do not tell: which images their placeholders stand for."""
        within = (image for image in self.images if image.start < end and start < image.end)
        return b"".join(f"{image.start} {image.content};".encode() for image in within)

    def end_of_whole_images(self, start: int, end: int) -> int:
        """The end of a chunk that is to be ``[start, end)`` and may not end inside an image.

        The image is left out, or wholly taken in if there is nothing before it.
        """
        for image in self.images:
            if image.start < end < image.end:
                return image.start if start < image.start else image.end
        return end

    def token_ids(self, start: int, end: int) -> list[int]:
        """The tokens ``[start, end)`` of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        output = self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        return self.prompt_token_ids[start:] + output
