"""Which inputs of which requests an encoder computes next.

Inputs cannot be cut, and nothing is kept of them, so a step is any set of inputs that fits the token budget. Requests
share it: the next input is always one of the request that has been given the fewest tokens so far, so that one text
beside a thousand waits for a step, not for the thousand. A request that arrives begins at the virtual time, which moves
on by each waiting request's share of a step, or it would have the steps to itself until it had caught up (Parekh and
Gallager 1993, "A generalized processor sharing approach to flow control"). Nobody is far from that time: neither does
a stream of newcomers keep an old request out, nor an old request a newcomer. A request's own inputs go longest first:
neighbours are of like length.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from lmserve.runtime.interface import EncoderInput

MAX_INPUTS_A_STEP = 1024
"""Of one token each, say: their rows have to fit into one message (16 MiB with 4,096 numbers in each)."""

Pick = tuple["EncoderRequest", int]
"""A request, and the place of one of its inputs."""


@dataclass(slots=True, eq=False)
class EncoderRequest:
    """A live request."""

    request_id: str
    inputs: list[EncoderInput]
    arrival: int
    num_tokens_given: int
    """Counted from the virtual time at its arrival, and kept near it: see ``EncoderQueue._advance``."""
    last_step: int
    """In which it was served last: of equal requests the one that was served longer ago goes first. A newcomer's is the
    step before the last one, so that it goes before those who had a part in that."""
    waiting: deque[int] = field(init=False)
    """Inputs that are in no step yet, longest first."""
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        by_length = sorted(range(len(self.inputs)), key=lambda i: -len(self.inputs[i].token_ids))
        self.waiting = deque(by_length)
        self.num_unfinished = len(self.inputs)


class EncoderQueue:
    """Owns the live requests and the order of their inputs."""

    def __init__(self) -> None:
        self.live: dict[str, EncoderRequest] = {}
        self.num_waiting = 0
        """Inputs."""
        self._num_arrivals = 0
        self._num_steps = 0
        self._now = 0
        """The virtual time, in tokens."""
        self._longest = 0
        """Of all inputs so far."""

    def add(self, request_id: str, inputs: list[EncoderInput]) -> None:
        self._num_arrivals += 1
        self.live[request_id] = EncoderRequest(request_id, inputs, self._num_arrivals, self._now, self._num_steps - 1)
        self.num_waiting += len(inputs)
        self._longest = max([self._longest, *(len(each.token_ids) for each in inputs)])

    def remove(self, request_id: str) -> bool:
        """Forgets a request, with what waits of it. Returns whether it was alive."""
        request = self.live.pop(request_id, None)
        if request is not None:
            self.num_waiting -= len(request.waiting)
        return request is not None

    def pick(self, max_tokens: int) -> list[Pick]:
        """The next step's inputs: as many as fit, and one at least if any waits."""
        self._num_steps += 1
        heap = [(*_turn(request), request) for request in self.live.values() if request.waiting]
        heapq.heapify(heap)
        num_requests = len(heap)
        picks: list[Pick] = []
        left = max_tokens
        while heap and len(picks) < MAX_INPUTS_A_STEP:
            request = heap[0][-1]
            num_tokens = len(request.inputs[request.waiting[0]].token_ids)
            if num_tokens > left and picks:
                heapq.heappop(heap)  # its turn comes first in the next step: it has been given the least
                continue
            picks.append((request, request.waiting.popleft()))
            left -= num_tokens
            request.num_tokens_given += num_tokens
            request.last_step = self._num_steps
            if request.waiting:
                heapq.heapreplace(heap, (*_turn(request), request))
            else:
                heapq.heappop(heap)
        self.num_waiting -= len(picks)
        if picks:
            self._advance(-(-(max_tokens - left) // num_requests), max_tokens)
        return picks

    def put_back(self, picks: list[Pick]) -> None:
        """What was picked last and could not be computed goes first again."""
        for request, index in reversed(picks):
            request.waiting.appendleft(index)
            request.num_tokens_given -= len(request.inputs[index].token_ids)
        self.num_waiting += len(picks)

    def _advance(self, share: int, max_tokens: int) -> None:
        """Moves the virtual time on by a request's share of a step, and keeps the waiting ones near it.

        Inputs are not cut, so somebody is always ahead and somebody behind; but what a request was given because
        nothing else fitted is not held against it for ever, nor are others to wait until all is made up for.
        """
        self._now += share
        span = max_tokens + self._longest
        for request in self.live.values():
            request.num_tokens_given = min(max(request.num_tokens_given, self._now - span), self._now + span)


def _turn(request: EncoderRequest) -> tuple[int, int, int]:
    """Lower goes first."""
    return request.num_tokens_given, request.last_step, request.arrival
