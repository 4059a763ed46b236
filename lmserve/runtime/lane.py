"""How a stock model is run over the ragged batch of a step. What a model gets is decided by looking (``choose.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from lmserve.runtime.interface import NewSequence
from lmserve.runtime.packed_lane import PackedBatch, StepProgram


class Lane(Protocol):
    """One model, one step at a time."""

    name: str
    model: Any
    program: StepProgram | None

    @property
    def min_rows(self) -> int:
        """Rows that a step is padded to."""
        ...

    @property
    def num_slots(self) -> int:
        """Tokens that there is room for."""
        ...

    def begin(self, new_sequences: Sequence[NewSequence]) -> None:
        """A step follows, in which these take their slots or are told again (``NewSequence.state``)."""
        ...

    def forward(self, batch: PackedBatch) -> Tensor:
        """(R, vocab) logits in the model's dtype, valid until the next call."""
        ...

    def stock_attention(self) -> AbstractContextManager[None]:
        """The model as transformers made it, for comparison."""
        ...

    def get_ready(self, num_used: int) -> bool:
        """See ``KVCache.get_ready``."""
        ...
