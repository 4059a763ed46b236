"""Traces of small modules, run as programs, against the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.native.build import FORMATS, _pack
from lmserve.runtime.native.plan import plan
from lmserve.runtime.native.program import Limits, Program, compile_segments
from lmserve.runtime.native.trace import NotTraceable, trace
from tests.runtime.native.availability import needs_native

VOCAB, WIDTH = 50, 96


class Model(nn.Module):
    """Embeddings, something over rows, and a head, called as transformers' models are."""

    def __init__(self, body: Callable[[nn.Module, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 160), nn.Linear(WIDTH, 160, bias=False), nn.Linear(160, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.body = body
        self.to(dtype).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        hidden = self.body(self, self.embed(input_ids), position_ids)
        return SimpleNamespace(logits=self.head(hidden[:, logits_to_keep]))


def run(model: Model, ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
    """As a program; its linear layers are packed afterwards."""
    graph = trace(model)
    made = plan(graph)
    segments = compile_segments(graph, made)
    weights = _pack(model, graph, made, FORMATS[model.dtype])
    layout = CacheLayout(4, 4, torch.device("cpu"), model.dtype)
    program = Program(graph, made, segments, [], layout, Limits(64, 64), weights)
    return program.run(ids, positions, torch.zeros_like(ids), kept, []).clone()


def gated(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    normed = m.norm(x)
    result: Tensor = x + m.down(functional.silu(m.gate(normed)) * m.up(normed))
    return result


def rotated(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embeddings over heads, by halves and by pairs."""
    heads = x.view(*x.shape[:2], 6, 16).transpose(1, 2)
    angles = positions[..., None].float() * torch.exp(-torch.arange(0, 8) / 3.0)
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    by_halves = heads * cos + torch.cat((-heads[..., 8:], heads[..., :8]), -1) * sin
    even, odd = by_halves[..., ::2], by_halves[..., 1::2]
    by_pairs = torch.stack((even * 0.5 - odd, odd + even), -1).flatten(-2)
    return by_pairs.transpose(1, 2).reshape(x.shape)


def capped(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    return torch.tanh(x / 3.0) * 3.0 + functional.gelu(x) + functional.gelu(x, approximate="tanh") + torch.sigmoid(x)


def picked(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    first, second, third = torch.split(x, [32, 32, 32], dim=-1)
    joined = torch.cat((third, first.clamp(-0.5, 0.25), second.abs().sqrt()), -1)
    chosen: Tensor = torch.where(joined > 0.1, joined.pow(2), -joined.exp()) + joined.amax(-1, keepdim=True)
    return chosen


def normed(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    heads = scaled.view(*x.shape[:2], 4, 24)
    centred = heads - heads.mean((-2, -1), keepdim=True)
    summed = heads.sum(-1).sum(-1, keepdim=True)
    result: Tensor = (m.norm.weight * centred.flatten(-2).to(x.dtype)) / (1.5 + summed).to(x.dtype)
    return result


def positioned(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    """Learned positions with an offset, as OPT has them."""
    result: Tensor = x + m.embed(positions + 2)
    return result


BODIES = (gated, rotated, capped, picked, normed, positioned)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("body", BODIES)
def test_a_program_computes_what_its_model_does(body: Any, dtype: torch.dtype) -> None:
    model = Model(body, dtype)
    ids = torch.randint(0, VOCAB, (23,))
    positions, kept = torch.arange(23), torch.tensor([22, 3, 3, 7])
    with torch.no_grad():
        expected = model(ids[None], positions[None], False, kept).logits[0]
        got = run(model, ids, positions, kept)
    assert got.dtype == dtype
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    assert error < (2e-6 if dtype == torch.float32 else 8e-3)


@needs_native
def test_a_token_has_the_same_bits_in_any_company() -> None:
    model = Model(gated, torch.bfloat16)
    ids, positions = torch.randint(0, VOCAB, (40,)), torch.arange(40)
    with torch.no_grad():
        graph = trace(model)
        made = plan(graph)
        segments = compile_segments(graph, made)
        weights = _pack(model, graph, made, "bfloat16")
        layout = CacheLayout(4, 4, torch.device("cpu"), model.dtype)
        program = Program(graph, made, segments, [], layout, Limits(64, 64), weights)
        whole = program.run(ids, positions, torch.zeros_like(ids), torch.arange(40), []).clone()
        for first, end in ((0, 1), (3, 4), (5, 12), (7, 40)):
            part = program.run(
                ids[first:end], positions[first:end], torch.zeros(end - first, dtype=torch.int64),
                torch.arange(end - first), [],
            )  # fmt: skip
            assert torch.equal(part, whole[first:end])


@needs_native
def test_layers_that_read_the_same_are_one_product_and_alike_layers_one_function() -> None:
    def deep(m: Any, x: Tensor, positions: Tensor) -> Tensor:
        for _ in range(5):
            x = gated(m, x, positions)
        return x

    graph = trace(Model(deep))
    made = plan(graph)
    assert [len(product.parts) for product in made.products] == [2, 1] * 5 + [1]
    bodies = {segment.body for segment in compile_segments(graph, made).segments.values()}
    assert len(bodies) <= 5, "the first layer, the others, the gate, the last sum"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda m, x, positions: x.cumsum(1), "its forward uses cumsum"),
        (lambda m, x, positions: x @ (x.transpose(1, 2) @ x), "multiplies"),
        (lambda m, x, positions: x if x.sum() > 0 else -x, "cannot be watched"),
        (lambda m, x, positions: torch.topk(x, 4).values.repeat(1, 1, 24), "its forward uses"),
    ],
)
def test_what_else_a_model_does_is_named(body: Any, message: str) -> None:
    with pytest.raises(NotTraceable, match=message):
        trace(Model(body))


def test_a_model_that_always_computes_all_logits_is_not_traced() -> None:
    with pytest.raises(NotTraceable, match="some tokens only"):
        trace(nn.Linear(3, 3))
