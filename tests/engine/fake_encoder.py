"""An encoder without a model: an input's row is a function of its tokens."""

from __future__ import annotations

import struct
from dataclasses import replace

from lmserve.runtime.interface import EncoderInput, RunnerInfo
from tests.engine.fake_runner import make_info

VOCAB_SIZE = 100
ROW_SIZE = 2


def encoder_info(max_num_batched_tokens: int = 32, max_model_len: int = 64) -> RunnerInfo:
    return replace(
        make_info(max_num_batched_tokens=max_num_batched_tokens),
        task="embed",
        row_size=ROW_SIZE,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        num_blocks=0,
        block_size=0,
        max_num_seqs=1,
    )


def row(each: EncoderInput) -> bytes:
    return struct.pack("<2f", sum(each.token_ids), len(each.token_ids))


class FakeEncoder:
    """``errors`` are raised, one a call, as long as there are some; None lets a call pass."""

    def __init__(self, info: RunnerInfo | None = None) -> None:
        self.info = info or encoder_info()
        self.errors: list[Exception | None] = []
        self.steps: list[list[EncoderInput]] = []

    def encode(self, inputs: list[EncoderInput]) -> list[bytes]:
        self.steps.append(inputs)
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return [row(each) for each in inputs]
