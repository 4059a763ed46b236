from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import FRESH_STATE, KEPT_STATE, NewSequence
from lmserve.runtime.packed_lane import PackedBatch, UnsupportedModel
from lmserve.runtime.serial_lane import SerialLane
from lmserve.sampling_params import SamplingParams
from tests.runtime.tiny_in_turn import build_in_turn

TOKENS = tuple(range(20, 32))


def sequence(slot: int, state: int = FRESH_STATE) -> NewSequence:
    return NewSequence(slot, TOKENS, len(TOKENS), SamplingParams(max_tokens=1), 0, state=state)


def chunk(slot: int, start: int, end: int) -> PackedBatch:
    """Of which all logits are wanted."""
    rows = torch.arange(end - start)
    spans = [Span(0, end - start, end, [0])]
    return PackedBatch(torch.tensor(TOKENS[start:end]), rows + start, rows, rows, spans, None, [slot], [()], range(end))


@torch.inference_mode()
def stock(lane: SerialLane) -> Tensor:
    logits: Tensor = lane.model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def test_a_chunk_that_failed_is_computed_from_what_was_before_it() -> None:
    """The model has put its tokens into its cache by then: that cache is of no use any more."""
    lane = SerialLane(build_in_turn("bloom"))
    expected = stock(lane)
    lane.begin([sequence(0)])
    lane.forward(chunk(0, 0, 6))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = lane.model.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        lane.forward(chunk(0, 6, 9))
    handle.remove()
    lane.begin([sequence(0, KEPT_STATE)])
    torch.testing.assert_close(lane.forward(chunk(0, 6, 9)), expected[6:9])
    torch.testing.assert_close(lane.forward(chunk(0, 9, 12)), expected[9:12])


@torch.inference_mode()
def test_a_slots_next_owner_begins_anew() -> None:
    lane = SerialLane(build_in_turn("gptj"))
    lane.begin([sequence(2)])
    lane.forward(chunk(2, 0, 7))
    lane.begin([sequence(2)])
    torch.testing.assert_close(lane.forward(chunk(2, 0, 12)), stock(lane))


@torch.inference_mode()
def test_what_a_token_takes_is_measured() -> None:
    """Bloom: keys and values of 48 numbers in each of 3 layers, of 4 bytes. RWKV keeps the same for any length."""
    assert SerialLane(build_in_turn("bloom")).measure() == (2 * 48 * 3 * 4, 0)
    per_token, per_sequence = SerialLane(build_in_turn("rwkv")).measure()
    assert (per_token, per_sequence % (48 * 4)) == (0, 0)
    assert per_sequence > 0


def test_a_model_without_a_cache_is_refused() -> None:
    model = build_in_turn("bloom")
    model.forward = lambda input_ids: input_ids
    with pytest.raises(UnsupportedModel, match="takes no cache"):
        SerialLane(model)
