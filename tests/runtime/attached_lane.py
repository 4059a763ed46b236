"""Lanes around tiny models, with a cache and a backend, and prompts to run through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from transformers import PreTrainedModel

from lmserve.runtime.attention import backend_class
from lmserve.runtime.attention.base import CacheLayout, Span
from lmserve.runtime.kv_cache import KVCache
from lmserve.runtime.packed_lane import PackedBatch, PackedLane
from tests.runtime.tiny_models import VOCAB_SIZE

BLOCK_SIZE = 4
NUM_BLOCKS = 48


def attach(model: PreTrainedModel) -> tuple[PackedLane, KVCache]:
    """A lane that is ready to run the model, wherever it is."""
    lane = PackedLane(model)
    shapes = lane.probe()
    layout = CacheLayout(BLOCK_SIZE, NUM_BLOCKS, model.device, model.dtype)
    cache = KVCache(shapes, layout)
    lane.attach(cache, backend_class("auto", model.device.type)(layout))
    return lane, cache


def logits(lane: PackedLane, num_tokens: int) -> Tensor:
    """Of each token of a random prompt, the same for each number of tokens."""
    device = lane.model.device
    ids = torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).to(device)
    where = torch.arange(num_tokens, device=device)
    spans = [Span(0, num_tokens, num_tokens, list(range(-(-num_tokens // BLOCK_SIZE))))]
    return lane.forward(PackedBatch(ids, where, where.clone(), where.clone(), spans)).clone()


def norm_error(got: Tensor, expected: Tensor) -> float:
    """Of the difference, as a share of what was expected."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


class CountingBackend:
    """A backend of torch.compile that counts what it compiles and how often that is run."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self._compile: Callable[..., Any] = lookup_backend(backend)
        self.num_compiled = 0
        self.num_runs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.num_compiled += 1
        compiled = self._compile(module, inputs)

        def run(*args: Any) -> Any:
            self.num_runs += 1
            return compiled(*args)

        return run
