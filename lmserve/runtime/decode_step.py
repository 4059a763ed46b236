"""Steps that only decode, captured once for each size and run again as one launch.

A step of n sequences runs in the smallest of a few sizes that holds it, padded with rows that see nothing, write to the
scratch block and draw for nobody. All that differs between two steps of a size lies in tensors that stay where they
are: the block tables by slot, the token sampled last by slot, the parameters of sampling by slot, and six numbers a row
that cross to the device in one copy. Token ids, lengths and cache rows are worked out of these on the device, so that
nothing of a step is baked into a graph. Drawing is a graph of its own: what a grammar or a penalty has to do with the
logits stands between the two, outside of them.

Graphs are captured when they are first wanted, the largest size before any other, and when nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.runtime.attention.base import AttentionBackend
from lmserve.runtime.block_tables import BlockTables
from lmserve.runtime.graphs import Graphs, GraphTable
from lmserve.runtime.interface import RunnerInfo
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.packing import DecodeRows
from lmserve.runtime.sampler import DrawKind, Sampler
from lmserve.runtime.sampling_state import SamplingFlags, SamplingState
from lmserve.runtime.transfer import send

NUM_INPUTS = 6
"""Of a row: slot, position, token (-1: the one sampled last), rotary position, and a new entry's place and block."""


def step_sizes(max_rows: int) -> list[int]:
    """Ascending, up to one that holds ``max_rows``: so close that little is computed for padding, and few."""
    sizes = [2, 4, 8, 16, 24, 32]
    while sizes[-1] < max_rows:
        sizes.append(sizes[-1] + max(16, 1 << (sizes[-1].bit_length() - 3)))
    return sizes[: next(i for i, size in enumerate(sizes) if size >= max_rows) + 1]


class DecodeSteps:
    """Owns the graphs of a model's decode steps and the tensors that they read and write.

    ``backend``: the lane's; it reads lengths on the device. Everything runs on the current stream, and a step's logits
    and tokens are overwritten by the next: whoever wants them has asked for copies before.
    """

    def __init__(
        self,
        lane: PackedLane,
        backend: AttentionBackend,
        sampler: Sampler,
        state: SamplingState,
        info: RunnerInfo,
        graphs: Graphs,
        *,
        has_rotary_grid: bool = False,
    ) -> None:
        assert backend.reads_device_lengths
        self._lane, self._backend = lane, backend
        self._sampler, self._state = sampler, state
        self._has_rotary_grid = has_rotary_grid
        self._block_size = info.block_size
        self._sizes = step_sizes(info.max_num_seqs)
        width = -(-info.max_model_len // info.block_size)
        device = state.device
        self.tables = BlockTables(info.max_num_seqs, width, backend.layout.scratch_block, device)
        self._inputs = torch.zeros(NUM_INPUTS * self._sizes[-1], dtype=torch.int64, device=device)
        self._rows = torch.arange(self._sizes[-1], device=device)
        self._token_ids = torch.zeros(self._sizes[-1], dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        """(largest size, vocab), in the number format that the model gives: made in the first run before a capture."""
        self._forwards = GraphTable[int](graphs, "A step of decodes")
        self._draws = GraphTable[tuple[int, DrawKind]](graphs, "The sampling of decodes")
        self._kinds = {DrawKind(): None}
        """Those that were ever wanted, in this order."""
        self._draw: tuple[int, DrawKind] | None = None
        """Of the step whose logits there are; None if its tokens are drawn in another way."""

    def forward(self, rows: DecodeRows, flags: SamplingFlags) -> Tensor | None:
        """(rows, vocab) logits; None if there is no graph for the step, and the lane has to compute it.

        ``flags``: the rows', for ``draw``.
        """
        num_rows = len(rows.slots)
        size = next(size for size in self._sizes if size >= num_rows)
        kind = self._sampler.kind(flags)
        if not self._capture_forward(size):
            return None
        self._draw = None
        if kind is not None and self._capture_draw(size, kind):
            self._kinds.setdefault(kind)
            self._draw = size, kind
        num_blocks = rows.positions // self._block_size + 1
        places, blocks = self.tables.learn(rows.slots, num_blocks, rows.block_tables)
        numbers = self._padding(size)
        numbers[:, :num_rows] = rows.slots, rows.positions, rows.known, rows.rotary_positions, places, blocks
        self._send(numbers)
        self._forwards.replay(size)
        assert self._logits is not None
        return self._logits[:num_rows]

    def draw(self, num_rows: int) -> Tensor | None:
        """(rows,) int64: the tokens of the step that ``forward`` has computed, after it has taken note of them; None
        if a row of it asks for more than is captured, and the sampler has to be called."""
        if self._draw is None:
            return None
        self._draws.replay(self._draw)
        return self._token_ids[:num_rows]

    def capture_next(self) -> bool:
        """Captures what a later step may want; whether there is more of it. Takes as long as a few steps."""
        wanted = next(self._wanted(), None)
        if wanted is None:
            return False
        size, kind = wanted
        if kind is None:
            self._capture_forward(size)
        else:
            self._capture_draw(size, kind)
        return next(self._wanted(), None) is not None

    def _wanted(self) -> Iterator[tuple[int, DrawKind | None]]:
        """What is not captured yet of all sizes, large ones first: the forward (None), the ways to draw that were ever
        wanted."""
        for size in reversed(self._sizes):
            if self._forwards.has_failed:
                return
            if size not in self._forwards:
                yield size, None
            for kind in self._kinds:
                if (size, kind) not in self._draws and not self._draws.has_failed:
                    yield size, kind

    def _capture_forward(self, size: int) -> bool:
        if size in self._forwards or self._forwards.has_failed:
            return size in self._forwards
        if len(self._forwards) == 0 and size != self._sizes[-1] and not self._capture_forward(self._sizes[-1]):
            return False
        self._send(self._padding(size))  # what is computed while it is captured must do no harm
        return self._forwards.capture(size, partial(self._run_forward, size))

    def _capture_draw(self, size: int, kind: DrawKind) -> bool:
        if (size, kind) in self._draws or self._draws.has_failed:
            return (size, kind) in self._draws
        self._send(self._padding(size))
        return self._draws.capture((size, kind), partial(self._run_draw, size, kind))

    def _padding(self, size: int) -> NDArray[np.int64]:
        """(NUM_INPUTS, size): rows of no sequence."""
        place, block = self.tables.no_entry
        return np.repeat(np.array([[self.tables.padding], [0], [0], [0], [place], [block]], np.int64), size, axis=1)

    def _send(self, numbers: NDArray[np.int64]) -> None:
        self._inputs[: numbers.size].copy_(send(numbers.ravel(), self._inputs.device))

    def _input(self, size: int) -> tuple[Tensor, ...]:
        return self._inputs[: NUM_INPUTS * size].view(NUM_INPUTS, size).unbind(0)

    def _run_forward(self, size: int) -> None:
        logits = self._compute(size)
        if self._logits is None:
            self._logits = logits.new_zeros(self._sizes[-1], logits.shape[1])
        self._logits[:size].copy_(logits)

    def _run_draw(self, size: int, kind: DrawKind) -> None:
        assert self._logits is not None
        slots, positions, *_ = self._input(size)
        self._token_ids[:size].copy_(self._sampler.draw(self._logits[:size], slots, positions + 1, kind))

    def _compute(self, size: int) -> Tensor:
        """(size, vocab): the logits of the rows whose inputs are on the device."""
        slots, positions, known, rotary_positions, places, blocks = self._input(size)
        self.tables.write(places, blocks)
        last = self._state.last_tokens.index_select(0, slots).clamp_min(0)  # where none could be drawn, any
        ids = torch.where(known < 0, last, known)
        kv_lens = (positions + 1).masked_fill(slots == self.tables.padding, 0).to(torch.int32)
        block = self.tables.look_up(slots, torch.div(positions, self._block_size, rounding_mode="floor"))
        slot_mapping = block * self._block_size + positions % self._block_size
        plan = self._backend.plan_decode(self.tables.blocks, slots, kv_lens)
        if self._has_rotary_grid:
            positions = torch.stack([positions, rotary_positions, rotary_positions, rotary_positions])
        return self._lane.forward_planned(ids, positions, slot_mapping, self._rows[:size], plan)
