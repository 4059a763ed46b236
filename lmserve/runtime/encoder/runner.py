"""Encoders on their devices: inputs become one step, and a row of numbers each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmserve.runtime.encoder.batch import EncoderBatch, make_batch
from lmserve.runtime.encoder.lanes import EncoderLane, PaddedEncoderLane
from lmserve.runtime.encoder.pooling import pool
from lmserve.runtime.encoder.recipe import Pooling
from lmserve.runtime.interface import EncoderInput, FatalRunnerError, RunnerInfo


class EmbeddingRunner:
    """Implements ``lmserve.runtime.interface.EncoderRunner``: a row is a text's embedding."""

    def __init__(
        self,
        lane: EncoderLane,
        pooling: Pooling,
        modules: list[nn.Module],
        info: RunnerInfo,
        truncate_dim: int | None = None,
    ) -> None:
        self.lane = lane
        self.info = info
        self._pooling = pooling
        self._modules = modules
        self._truncate_dim = truncate_dim

    @torch.inference_mode()
    def encode(self, inputs: list[EncoderInput]) -> list[bytes]:
        """A row of float32 for each input, in their order."""
        batch = make_batch(inputs, self.lane.model.device)
        try:
            rows = pool(self.lane.hidden_states(batch), batch, self._pooling)
            for module in self._modules:
                rows = module(rows)
            return _in_order(rows[:, : self._truncate_dim], batch)
        except torch.AcceleratorError as error:
            raise FatalRunnerError(str(error)) from error


class ScoreRunner:
    """Implements ``lmserve.runtime.interface.EncoderRunner``: a row is a pair's scores, one for each label."""

    def __init__(self, lane: PaddedEncoderLane, activation: nn.Module, info: RunnerInfo) -> None:
        self.lane = lane
        self.info = info
        self._activation = activation

    @torch.inference_mode()
    def encode(self, inputs: list[EncoderInput]) -> list[bytes]:
        """A row of float32 for each input, in their order."""
        batch = make_batch(inputs, self.lane.model.device)
        try:
            logits = torch.cat([output.logits for output, _ in self.lane.forwards(batch)])
            # In float64, for vector instructions and those for what is left behind them round a float32 otherwise.
            return _in_order(self._activation(logits.cpu().double()), batch)
        except torch.AcceleratorError as error:
            raise FatalRunnerError(str(error)) from error


def _in_order(rows: Tensor, batch: EncoderBatch) -> list[bytes]:
    """The rows as bytes, in the order of the inputs."""
    result = [b""] * len(batch.order)
    for index, row in zip(batch.order, rows.float().cpu().numpy().astype("<f4"), strict=True):
        result[index] = row.tobytes()
    return result
