"""From logits to tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmserve.runtime import filters
from lmserve.runtime.logprobs import RankedLogprobs, rank_logprobs
from lmserve.runtime.noise import noise_bits, row_keys, token_keys, unit_exponential
from lmserve.runtime.sampling_state import Need, RowParams, SamplingFlags, SamplingState
from lmserve.runtime.transfer import send_list

_CHUNK_ELEMENTS_CPU = 1 << 19  # a chunk's buffers stay in the last-level cache
_CHUNK_ELEMENTS = 1 << 24  # elsewhere launches count, and the buffers' memory
_FILTERS = Need.MIN_P | Need.TOP_K | Need.TOP_P_OF_K | Need.TOP_P
_SMALLEST_TOP_K = 64


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token a row, still on the device.

    Attributes:
        token_ids: (rows,) int64; -1 where nothing could be drawn: the logits hold a NaN, or no token is allowed.
        logprobs: of all rows; those that did not ask for log-probabilities hold zeros. None if no row asked.
    """

    token_ids: Tensor
    logprobs: RankedLogprobs | None = None


@dataclass(frozen=True, slots=True)
class DrawKind:
    """What ``Sampler.draw`` does for all of its rows, whether they ask for it or not."""

    needs: Need = Need.NONE
    max_top_k: int = 0
    """A power of two, or the vocabulary's size, so that there are few kinds."""


class Sampler:
    """Draws one token a row. The order of operations:

    1. ``logit_bias`` is added.
    2. Penalties: repetition over prompt and output (positive logits divided, negative ones multiplied), then
       frequency and presence over the output (subtracted).
    3. Masks: the ends that ``min_tokens`` holds back, then the grammar's.
    4. A row with temperature 0 takes its largest logit, among equals the lowest token id, and is done.
    5. Temperature divides; softmax.
    6. ``min_p``, 7. ``typical_p``, 8. ``top_k``, 9. ``top_p`` (``lmserve.runtime.filters``).
    10. The draw: the smallest E_i / p_i, with unit exponentials E_i hashed from (seed, choice, position, token id)
        (``lmserve.runtime.noise``).
    11. The token is counted for the penalties of the next step.
    Log-probabilities are of the logits as the model gave them, in float32.

    Everything is row by row: a row gets the same token alone and in any batch. No operation waits for the device or
    makes a shape from its data. What is skipped is decided by ``SamplingFlags`` alone; a parameter that is off changes
    no bit of a row that happens to share a chunk with one that needs it.
    """

    def __init__(self, state: SamplingState, first_largest: Callable[[Tensor], Tensor] | None = None) -> None:
        """``first_largest``: a faster way to greedy choices, from (rows, vocab) logits as they are; -1 for none."""
        self._state = state
        self._first_largest_of_logits = first_largest
        vocab_size, device = state.vocab_size, state.device
        assert vocab_size < 2**24, "token ids have to be exact in float32"
        elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS
        self._chunk_rows = max(1, min(state.num_slots, elements // max(vocab_size, filters.BUCKETS)))
        self._buffers = torch.empty(2, self._chunk_rows, vocab_size, device=device)
        self._bits = torch.empty(self._chunk_rows, vocab_size, dtype=torch.int32, device=device)
        self._token_keys = token_keys(vocab_size, device)
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
        self._byte_values = torch.zeros(256, 8, device=device).masked_fill_(bits == 0, -math.inf)
        self._ranks = torch.arange(vocab_size, 0, -1, device=device).to(torch.float32)

    def __call__(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        flags: SamplingFlags,
        grammar_mask: Tensor | None = None,
    ) -> SampledTokens:
        """Samples and takes note of the tokens in the state.

        Args:
            logits: (rows, vocab) float32, bfloat16 or float16; left as it is.
            slots: (rows,) int64, on the device, each slot at most once.
            positions: (rows,) integers, on the device: the index that the new token gets in its sequence.
            flags: ``SamplingState.flags`` of the same slots.
            grammar_mask: (rows, ceil(vocab / 32)) int32; bit i % 32 of word i // 32 allows token i. All bits are set in
                the rows that do not need ``GRAMMAR``.
        """
        if not flags.needs:
            return SampledTokens(torch.empty(0, dtype=torch.int64, device=logits.device))
        rows = _Rows(logits, slots, positions, grammar_mask)
        order = sorted(range(len(flags.needs)), key=lambda row: flags.needs[row] & ~Need.LOGPROBS)
        if order == list(range(len(order))):
            token_ids = self._sample(rows, flags)
        else:
            index = send_list(order, torch.int64, logits.device)
            sampled = self._sample(rows.select(index), flags.select(order))
            token_ids = torch.empty_like(sampled).index_copy_(0, index, sampled)
        self._state.record(slots, token_ids, flags.union)
        return with_logprobs(token_ids, logits, flags)

    def kind(self, flags: SamplingFlags) -> DrawKind | None:
        """The work that ``draw`` has to do for such rows; None if one of them asks for what it does not do."""
        needs = flags.union & ~Need.LOGPROBS
        if needs & ~(Need.SAMPLE | _FILTERS):
            return None
        top_k = max(flags.top_k, default=0)
        if Need.TOP_K in needs:
            top_k = min(max(_SMALLEST_TOP_K, 1 << (top_k - 1).bit_length()), self._state.vocab_size)
        return DrawKind(needs, top_k)

    def draw(self, logits: Tensor, slots: Tensor, positions: Tensor, kind: DrawKind) -> Tensor:
        """(rows,) int64: the tokens that a call gives for the same rows, found without knowing on the host what each of
        them asks for, so that it can be captured. Takes note of them. Rows of padding may be among them."""
        rows = _Rows(logits, slots, positions, None)
        starts = range(0, len(slots), self._chunk_rows)
        token_ids = torch.cat([self._draw_chunk(rows.cut(start, start + self._chunk_rows), kind) for start in starts])
        self._state.record(slots, token_ids, kind.needs)
        return token_ids

    def _draw_chunk(self, rows: _Rows, kind: DrawKind) -> Tensor:
        logits, probs = self._buffers[:, : rows.slots.shape[0]].unbind(0)
        logits.copy_(rows.logits)
        greedy = self._first_largest(logits, -math.inf, scratch=probs)
        if Need.SAMPLE not in kind.needs:
            return greedy
        params = self._state.params(rows.slots)
        drawn = self._race(logits, probs, rows, params, kind.needs, kind.max_top_k)
        return torch.where(params.draws[:, 0] > 0, drawn, greedy)

    def _sample(self, rows: _Rows, flags: SamplingFlags) -> Tensor:
        """(rows,) int64. Rows with like needs stand together: a chunk does what any of its rows asks for."""
        token_ids = torch.empty(len(flags.needs), dtype=torch.int64, device=self._state.device)
        num_plain = 0
        if self._first_largest_of_logits is not None:
            num_plain = sum(needs & ~Need.LOGPROBS == Need.NONE for needs in flags.needs)
            if num_plain:
                token_ids[:num_plain] = self._first_largest_of_logits(rows.logits[:num_plain])
        for chunk in self._chunks(flags.needs, num_plain):
            part = flags.select(chunk)
            sampled = self._sample_chunk(rows.cut(chunk.start, chunk.stop), part.union, max(part.top_k))
            token_ids[chunk.start : chunk.stop] = sampled
        return token_ids

    def _chunks(self, needs: Sequence[Need], start: int) -> Iterator[range]:
        """Neighbouring rows from ``start`` on, as many as the buffers hold, all of them greedy or none."""
        for end in range(start + 1, len(needs) + 1):
            is_full = end - start == self._chunk_rows
            if is_full or end == len(needs) or needs[end] & Need.SAMPLE != needs[start] & Need.SAMPLE:
                yield range(start, end)
                start = end

    def _sample_chunk(self, rows: _Rows, needs: Need, max_top_k: int) -> Tensor:
        logits, probs = self._buffers[:, : rows.slots.shape[0]].unbind(0)
        logits.copy_(rows.logits)
        params = self._state.params(rows.slots)
        self._adjust(logits, rows, params, needs)
        if Need.SAMPLE not in needs:
            return self._first_largest(logits, -math.inf, scratch=probs)
        return self._race(logits, probs, rows, params, needs, max_top_k)

    def _race(
        self, logits: Tensor, probs: Tensor, rows: _Rows, params: RowParams, needs: Need, max_top_k: int
    ) -> Tensor:
        """From temperature to token; both buffers are overwritten."""
        # The largest logit becomes 0 first, so that no temperature, however small, can overflow.
        logits.sub_(logits.amax(-1, keepdim=True)).div_(params.temperature)
        torch.softmax(logits, -1, out=probs)
        _filter(probs, params, needs, max_top_k, scratch=logits)
        keys = row_keys(self._state.request_keys.index_select(0, rows.slots), rows.positions)
        bits = self._bits[: rows.slots.shape[0]]
        noise_bits(keys, self._token_keys, out=bits, scratch=logits.view(torch.int32))
        race = torch.div(probs, unit_exponential(bits, out=logits), out=logits)
        return self._first_largest(race, 0.0, scratch=probs)

    def _adjust(self, logits: Tensor, rows: _Rows, params: RowParams, needs: Need) -> None:
        """Bias, penalties and masks, in place."""
        state, slots = self._state, rows.slots
        if Need.BIAS in needs:
            logits.scatter_add_(1, state.bias.ids.index_select(0, slots), state.bias.values.index_select(0, slots))
        if state.seen is not None and Need.SEEN in needs:
            # Negative and positive part apart: several times faster on a CPU than choosing between two results.
            penalty = torch.where(state.seen.index_select(0, slots), params.repetition_penalty, 1.0)
            negative = logits.clamp_max(0).mul_(penalty)
            logits.clamp_min_(0).div_(penalty).add_(negative)
        if state.counts is not None and Need.COUNTS in needs:
            counts = state.counts.index_select(0, slots)
            logits.sub_(counts * params.frequency_penalty)
            logits.sub_(counts.clamp_max_(1).mul_(params.presence_penalty))
        if Need.MIN_TOKENS in needs:
            held_back = rows.positions[:, None] < params.first_end_position
            values = state.ends.values.index_select(0, slots).masked_fill_(~held_back, 0.0)
            logits.scatter_add_(1, state.ends.ids.index_select(0, slots), values)
        if rows.grammar_mask is not None and Need.GRAMMAR in needs:
            logits.add_(self._unpack(rows.grammar_mask))

    def _unpack(self, mask: Tensor) -> Tensor:
        """(rows, vocab) float32 from (rows, words) int32, lowest bit first: 0 where it allows, else minus infinity.

        A table of what each byte stands for, and an addition: several times faster on a CPU than bits and masked_fill.
        """
        values = self._byte_values.index_select(0, mask.contiguous().view(torch.uint8).flatten().to(torch.int64))
        return values.view(mask.shape[0], -1)[:, : self._state.vocab_size]

    def _first_largest(self, values: Tensor, floor: float, *, scratch: Tensor) -> Tensor:
        """(rows,) int64: the lowest token id with the row's largest value, -1 unless that is above ``floor``.

        Two reductions that vectorise; argmax does not on a CPU and takes four times as long.
        """
        largest = values.amax(-1, keepdim=True)
        torch.eq(values, largest, out=scratch)
        first = self._state.vocab_size - scratch.mul_(self._ranks).amax(-1).to(torch.int64)
        return first.masked_fill_(~(largest[:, 0] > floor), -1)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The arguments of ``Sampler.__call__``, row by row."""

    logits: Tensor
    slots: Tensor
    positions: Tensor
    grammar_mask: Tensor | None

    def select(self, index: Tensor) -> _Rows:
        mask = None if self.grammar_mask is None else self.grammar_mask.index_select(0, index)
        logits, slots, positions = (t.index_select(0, index) for t in (self.logits, self.slots, self.positions))
        return _Rows(logits, slots, positions, mask)

    def cut(self, start: int, end: int) -> _Rows:
        mask = None if self.grammar_mask is None else self.grammar_mask[start:end]
        return _Rows(self.logits[start:end], self.slots[start:end], self.positions[start:end], mask)


def _filter(probs: Tensor, params: RowParams, needs: Need, max_top_k: int, *, scratch: Tensor) -> None:
    """Zeros the probabilities that min_p, typical_p, top_k and top_p rule out, in place."""

    def keep(threshold: Tensor) -> None:
        # Both vectorise, a mask of bool does not.
        torch.ge(probs, threshold, out=scratch)
        probs.mul_(scratch)

    if Need.MIN_P in needs:
        keep(filters.min_p_threshold(probs, params.min_p))
    if Need.TYPICAL_P in needs:
        filters.drop_atypical(probs, params.typical_p)
    if Need.TOP_K in needs:
        threshold, best = filters.top_k_threshold(probs, params.top_k, max_top_k)
        keep(threshold)
        if Need.TOP_P not in needs and Need.TOP_P_OF_K in needs:
            keep(filters.top_p_threshold_of_k(best, probs, params.top_p))
    if Need.TOP_P in needs:
        keep(filters.top_p_threshold(probs, params.top_p))


def with_logprobs(token_ids: Tensor, logits: Tensor, flags: SamplingFlags) -> SampledTokens:
    """Adds the log-probabilities of the rows that want them."""
    rows = [row for row, needs in enumerate(flags.needs) if Need.LOGPROBS in needs]
    if not rows:
        return SampledTokens(token_ids)
    index = send_list(rows, torch.int64, logits.device)
    ranked = rank_logprobs(logits, index, token_ids.index_select(0, index))

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(len(token_ids), *part.shape[1:]).index_copy_(0, index, part)

    return SampledTokens(token_ids, RankedLogprobs(*map(spread, (ranked.chosen, ranked.top_ids, ranked.top))))
