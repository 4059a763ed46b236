"""What the sampler remembers of each slot, on the device, and what the host knows of it without asking the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from lmserve.runtime.noise import request_key
from lmserve.runtime.transfer import send_list
from lmserve.sampling_params import SamplingParams

_TINY = torch.finfo(torch.float32).tiny


class Need(IntFlag):
    """Work that a row asks of the sampler; what no row asks for is skipped. Later members cost more."""

    NONE = 0
    LOGPROBS = auto()
    MIN_TOKENS = auto()
    GRAMMAR = auto()
    BIAS = auto()
    COUNTS = auto()
    """Presence or frequency penalty."""
    SEEN = auto()
    """Repetition penalty."""
    SAMPLE = auto()
    """Temperature over 0; the members below come only with it."""
    MIN_P = auto()
    TOP_K = auto()
    TOP_P_OF_K = auto()
    """top_p together with top_k: it looks at k tokens."""
    TOP_P = auto()
    """top_p alone: it looks at the whole vocabulary."""
    TYPICAL_P = auto()


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """What the host knows of the rows of one step. One entry a row."""

    needs: tuple[Need, ...]
    top_k: tuple[int, ...]
    """0 where the row does not ask for it."""

    @property
    def union(self) -> Need:
        """What any of the rows asks for."""
        return reduce(or_, self.needs, Need.NONE)

    def select(self, rows: Sequence[int]) -> SamplingFlags:
        return SamplingFlags(tuple(self.needs[row] for row in rows), tuple(self.top_k[row] for row in rows))


@dataclass(frozen=True, slots=True)
class RowParams:
    """The parameters of some rows, each (rows, 1). Off is the value that changes nothing; a greedy row is all off."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    top_k: Tensor
    """int64; the vocabulary's size is off."""
    first_end_position: Tensor
    """int64; where the sequence may end for the first time (``min_tokens``)."""
    draws: Tensor
    """int64; 0 where the row is greedy, else 1."""


class SamplingState:
    """One row a slot of every sampling parameter, plus what the penalties remember of a sequence's tokens.

    A row means nothing until ``set_slot`` gave the slot an owner. Whoever launches steps calls ``set_slot`` between
    launches; ``record`` runs inside one and never waits for the device. The matrices over the vocabulary and the padded
    lists are made when a request first asks for them: most servers never see one.

    Behind the slots' rows there is one more of each parameter, for rows that pad a step: it is greedy.

    Attributes:
        last_tokens: (slots + 1,) int64, the token sampled last; -1 where nothing could be drawn.
        request_keys: (slots + 1, 2) int32, the hash of seed and choice.
        bias: what ``logit_bias`` adds.
        ends: minus infinity for the tokens that ``min_tokens`` holds back.
        counts: (slots, vocab) float32, how often each token was generated; None until asked for.
        seen: (slots, vocab) bool, whether a token is in the prompt or the output; None until asked for.
    """

    def __init__(self, *, max_num_seqs: int, vocab_size: int, device: torch.device | str) -> None:
        self.num_slots = max_num_seqs
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        # One tensor of each type, so that a new owner costs three copies and not eleven.
        self._floats = torch.ones(7, max_num_seqs + 1, device=self.device)
        self._ints = torch.zeros(3, max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self._ints[0].fill_(vocab_size)  # top_k
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self.request_keys = torch.zeros(max_num_seqs + 1, 2, dtype=torch.int32, device=self.device)
        self.bias = TokenValues(max_num_seqs, self.device)
        self.ends = TokenValues(max_num_seqs, self.device)
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        self._needs = [Need.NONE] * max_num_seqs
        self._top_k = [0] * max_num_seqs
        self._num_logprobs: list[int | None] = [None] * max_num_seqs

    def set_slot(
        self,
        slot: int,
        sampling: SamplingParams,
        choice: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        *,
        has_grammar: bool = False,
    ) -> None:
        """Gives ``slot`` a new owner, or its old one back after a preemption with the output so far.

        Token ids outside the vocabulary, in biases or stop ids, have no logit and are passed over.
        """
        needs = _needs(sampling, self.vocab_size, len(output_token_ids)) | (Need.GRAMMAR if has_grammar else Need.NONE)
        self._needs[slot] = needs
        self._top_k[slot] = sampling.top_k if Need.TOP_K in needs else 0
        self._num_logprobs[slot] = sampling.logprobs
        first_end = len(prompt_token_ids) + sampling.min_tokens if Need.MIN_TOKENS in needs else 0
        ends = {*sampling.stop_token_ids, *eos_token_ids} if Need.MIN_TOKENS in needs else ()
        ints = (self._top_k[slot] or self.vocab_size, first_end, Need.SAMPLE in needs)
        self._floats[:, slot].copy_(send_list(_float_row(sampling), torch.float32, self.device))
        self._ints[:, slot].copy_(send_list(ints, torch.int64, self.device))
        self.request_keys[slot].copy_(send_list(request_key(sampling.seed, choice), torch.int32, self.device))
        self.bias.set(slot, self._known(sampling.logit_bias))
        self.ends.set(slot, self._known([(token_id, -math.inf) for token_id in ends]))
        self._remember(slot, needs, prompt_token_ids, output_token_ids)

    def flags(self, slots: Sequence[int]) -> SamplingFlags:
        """What the rows of a step ask for, when row i is slot ``slots[i]``."""
        return SamplingFlags(tuple(self._needs[slot] for slot in slots), tuple(self._top_k[slot] for slot in slots))

    def params(self, slots: Tensor) -> RowParams:
        """The parameters of the rows whose slots, (rows,) int64, are given."""
        columns = (*self._floats.index_select(1, slots), *self._ints.index_select(1, slots))
        return RowParams(*(column[:, None] for column in columns))

    def num_logprobs(self, slot: int) -> int | None:
        """How many of the likeliest tokens the slot's owner wants listed; None for no log-probabilities at all."""
        return self._num_logprobs[slot]

    def record(self, slots: Tensor, token_ids: Tensor, needs: Need) -> None:
        """Takes note of sampled tokens.

        Slots that do not ask for penalties are counted too: their rows are rebuilt before anybody reads them.

        Args:
            slots: (rows,) int64, each at most once but for padding's.
            token_ids: (rows,) int64; -1 counts as token 0.
            needs: of all rows together.
        """
        self.last_tokens.index_copy_(0, slots, token_ids)
        if not needs & (Need.COUNTS | Need.SEEN):
            return
        where = slots * self.vocab_size + token_ids.clamp_min(0)
        if self.counts is not None:
            self.counts.view(-1).index_add_(0, where, torch.ones_like(where, dtype=torch.float32))
        if self.seen is not None:
            self.seen.view(-1).index_fill_(0, where, True)

    def _remember(self, slot: int, needs: Need, prompt: Sequence[int], output: Sequence[int]) -> None:
        shape = (len(self._needs), self.vocab_size)
        if Need.COUNTS in needs:
            if self.counts is None:
                self.counts = torch.zeros(shape, device=self.device)
            ids = send_list(output, torch.int64, self.device)
            self.counts[slot].zero_().index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        if Need.SEEN in needs:
            if self.seen is None:
                self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            ids = send_list((*prompt, *output), torch.int64, self.device)
            self.seen[slot].zero_().index_fill_(0, ids, True)

    def _known(self, values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(token_id, value) for token_id, value in values if 0 <= token_id < self.vocab_size]


class TokenValues:
    """For each slot a short list of (token id, value), padded with (0, 0.0), which adds nothing.

    Attributes:
        ids: (slots, length) int64.
        values: (slots, length) float32.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_slots, 0, dtype=torch.int64, device=device)
        self.values = torch.zeros(num_slots, 0, device=device)

    def set(self, slot: int, pairs: Sequence[tuple[int, float]]) -> None:
        """Replaces the slot's list. The longest list so far decides the length of all, a power of two."""
        if len(pairs) > self.ids.shape[1]:
            missing = (1 << (len(pairs) - 1).bit_length()) - self.ids.shape[1]
            self.ids = torch.nn.functional.pad(self.ids, (0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, missing))
        length = self.ids.shape[1]
        if length > 0:
            padded = [*pairs, *[(0, 0.0)] * (length - len(pairs))]
            ids, values = zip(*padded, strict=True)
            self.ids[slot].copy_(send_list(ids, torch.int64, self.ids.device))
            self.values[slot].copy_(send_list(values, torch.float32, self.ids.device))


def _float_row(sampling: SamplingParams) -> tuple[float, ...]:
    return (
        # The smallest temperatures would round to 0 in float32.
        1.0 if sampling.is_greedy else max(sampling.temperature, _TINY),
        sampling.top_p,
        sampling.min_p,
        sampling.typical_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )


def _needs(sampling: SamplingParams, vocab_size: int, num_output_tokens: int) -> Need:
    wanted = [
        (Need.LOGPROBS, sampling.logprobs is not None),
        (Need.MIN_TOKENS, num_output_tokens < sampling.min_tokens),
        (Need.BIAS, bool(sampling.logit_bias)),
        (Need.COUNTS, sampling.presence_penalty != 0 or sampling.frequency_penalty != 0),
        (Need.SEEN, sampling.repetition_penalty != 1),
    ]
    if not sampling.is_greedy:
        has_top_k = 0 < sampling.top_k < vocab_size
        wanted += [
            (Need.SAMPLE, True),
            (Need.MIN_P, sampling.min_p > 0),
            (Need.TOP_K, has_top_k),
            (Need.TOP_P_OF_K if has_top_k else Need.TOP_P, sampling.top_p < 1),
            (Need.TYPICAL_P, sampling.typical_p < 1),
        ]
    return reduce(or_, (need for need, is_wanted in wanted if is_wanted), Need.NONE)
