"""Merged products give what the layers give, in whatever order they are called, and take no more memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lmserve.runtime.merged_linear import HandedOverLinear, MergedLinear, hand_over_products, merge_linears
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.quantization import Int8Linear, quantize
from tests.runtime.attached_lane import attach, logits, norm_error
from tests.runtime.tiny_models import FAMILIES, build_tiny, in_dtype

ROWS = (4, 31, 2)
NUM_GROUPS = {"phi3": 0, "gpt2": 0, "qwen3-moe": 4, "mixtral": 4, "gpt-oss": 4, "deepseek-v3": 4}
"""Of four layers: queries, keys and values, and the gate; fewer where they are one layer already, or experts."""


def parts(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MergedLinear)}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_same_logits_with_the_same_state(family: str, dtype: torch.dtype) -> None:
    """The same bits where it was tried; other processors may round otherwise in products of another shape."""
    model = in_dtype(build_tiny(family), dtype)
    lane, _ = attach(model)
    expected = [logits(lane, n) for n in ROWS]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_bytes = sum(p.nbytes for p in model.parameters())
    assert merge_linears(model, PackedLane(model).probe) == NUM_GROUPS.get(family, 8)
    assert sum(p.nbytes for p in model.parameters()) == num_bytes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    lane, _ = attach(model)
    for num_rows, wanted in zip(ROWS, expected, strict=True):
        assert norm_error(logits(lane, num_rows), wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_parts_of_a_group_are_views_of_one_weight() -> None:
    model = build_tiny("qwen2")
    merge_linears(model, PackedLane(model).probe)
    attention, mlp = model.get_submodule("model.layers.1.self_attn"), model.get_submodule("model.layers.1.mlp")
    for parent, names in ((attention, ("q_proj", "k_proj", "v_proj")), (mlp, ("gate_proj", "up_proj"))):
        layers = [getattr(parent, name) for name in names]
        assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
        shared = layers[0].weight.untyped_storage().nbytes()
        assert shared == sum(layer.weight.nbytes for layer in layers)
    assert sorted(name.rpartition(".")[2] for name in parts(model)) == sorted(
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] * 4
    )


class Block(nn.Module):
    """Three layers over one input, called as it is told."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(8, n, bias=bias) for n in (6, 4, 5))
        self.requires_grad_(False)

    def forward(self, x: Tensor, order: str = "qkv") -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name in order}


def alone(block: Block, x: Tensor, order: str) -> dict[str, Tensor]:
    return {name: x @ getattr(block, name).weight.T + getattr(block, name).bias for name in order}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(got[name], expected[name], rtol=1e-5, atol=1e-6) for name in expected)


def merged(block: nn.Module, *args: Any, rows: int = 3) -> int:
    return merge_linears(block, lambda: block(torch.ones(1, rows, 8), *args))


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("addmm", "mm")
        return func(*args, **(kwargs or {}))


def test_one_product_is_computed_for_all() -> None:
    block = Block()
    assert merged(block) == 1
    with Products() as products:
        block(torch.randn(1, 3, 8))
    assert products.count == 1


@pytest.mark.parametrize("order", ["qkv", "k", "vkq", "qk", "kv", "qqkv", "qkvv", "qvk"])
@pytest.mark.parametrize("handed_over", [False, True])
def test_parts_are_right_in_any_order(order: str, handed_over: bool) -> None:
    block = Block()
    x = torch.randn(1, 3, 8)
    expected = alone(block, x, "qkv")
    assert merged(block) == 1
    if handed_over:
        hand_over_products(block)
    for name in order:
        assert torch.allclose(getattr(block, name)(x), expected[name], rtol=1e-5, atol=1e-6)
    assert same(block(x), expected)


@pytest.mark.parametrize("first", ["q", "qk", "qkv"])
@pytest.mark.parametrize("second", ["k", "kv", "v", "qkv"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_nothing_stale_is_taken_for_an_input_that_was_overwritten(
    first: str, second: str, mode: Callable[[], Any]
) -> None:
    """As the buffers of a captured step are: the same tensor, other numbers."""
    block = Block()
    assert merged(block) == 1
    with mode():
        buffer = torch.randn(1, 3, 8)
        block(buffer, first)
        buffer.copy_(torch.randn(1, 3, 8))
        assert same(block(buffer, second), alone(block, buffer, second))


@torch.inference_mode()
def test_columns_are_taken_once() -> None:
    """Whoever calls the layers without their parent."""
    block, x = Block(), torch.randn(1, 3, 8)
    assert merged(block) == 1
    block.q(x)
    block.k(x)
    x.copy_(torch.randn(1, 3, 8))
    assert torch.allclose(block.k(x), alone(block, x, "k")["k"], rtol=1e-5, atol=1e-6)


def test_another_input_is_another_product() -> None:
    block = Block()
    x, y = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    assert merged(block) == 1
    block.q(x)
    assert torch.allclose(block.k(y), alone(block, y, "k")["k"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(block.k(x), alone(block, x, "k")["k"], rtol=1e-5, atol=1e-6)


def test_a_result_is_not_kept_longer_than_it_is_needed() -> None:
    block = Block()
    assert merged(block) == 1
    x = torch.randn(1, 3, 8)
    held = weakref.ref(x)
    block(x)
    del x
    assert held() is None


class Overwriting(Block):
    """Changes its input between the calls."""

    def forward(self, x: Tensor, order: str = "qkv") -> dict[str, Tensor]:
        x = x + 0.0
        q = self.q(x)
        x *= 2.0
        return {"q": q, "k": self.k(x), "v": self.v(x)}


def test_an_input_that_is_overwritten_between_the_calls_is_another() -> None:
    block, x = Overwriting(), torch.randn(1, 3, 8)
    expected = {**alone(block, x, "q"), **alone(block, 2 * x, "kv")}
    assert merged(block) == 1
    assert type(block.q) is nn.Linear
    assert same(block(x), expected)


class Flattening(Block):
    """Wants results whose rows are adjacent."""

    def forward(self, x: Tensor, order: str = "qkv") -> dict[str, Tensor]:
        return {name: getattr(self, name)(x).view(-1) for name in order}


def test_a_model_that_needs_adjacent_rows_is_left_as_it_was() -> None:
    block, x = Flattening(), torch.randn(1, 3, 8)
    expected = block(x)
    assert merged(block) == 0
    assert parts(block) == {}
    assert same(block(x), expected)


def with_hook(block: Block) -> None:
    block.k.register_forward_hook(lambda module, args, out: out)


def with_subclass(block: Block) -> None:
    block.k = type("Special", (nn.Linear,), {})(8, 4)


def with_another_forward(block: Block) -> None:
    block.k.forward = lambda x: x[..., :4]  # type: ignore[method-assign, assignment]


def tied(block: Block) -> None:
    block.other = nn.Linear(8, 4)
    block.other.weight = block.k.weight


def shared(block: Block) -> None:
    block.other = block.k


def without_bias(block: Block) -> None:
    block.k = nn.Linear(8, 4, bias=False)


@pytest.mark.parametrize("change", [with_hook, with_subclass, with_another_forward, tied, shared, without_bias])
def test_layers_that_are_more_than_a_product_are_left_alone(change: Callable[[Block], None]) -> None:
    block, x = Block(), torch.randn(1, 3, 8)
    change(block)
    expected = block(x)
    layer = block.k
    merged(block)
    assert block.k is layer
    assert same(block(x), expected)


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    block = Block()
    assert merged(block, "qkvq") == 0


def test_the_head_that_is_the_embedding_is_left_alone() -> None:
    model: Any = build_tiny("llama", tie_word_embeddings=True)
    merge_linears(model, PackedLane(model).probe)
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight is model.get_input_embeddings().weight


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many of some tensors are there whenever others are joined."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "cat":
            self.counts.append(sum(tensor() is not None for tensor in self._tensors))
        return func(*args, **(kwargs or {}))


def test_old_weights_are_let_go_of_before_the_next_group() -> None:
    blocks = nn.Sequential(*(Block(bias=False) for _ in range(4)))

    def run() -> None:
        for block in blocks:
            block(torch.ones(1, 3, 8))

    with Alive(blocks.parameters()) as alive:
        assert merge_linears(blocks, run) == 4
    assert alive.counts == [12, 9, 6, 3]


@torch.inference_mode()
def test_products_can_be_quantized_once_they_are_handed_over() -> None:
    model = build_tiny("qwen2")
    lane, _ = attach(model)
    expected = logits(lane, 9)
    merge_linears(model, PackedLane(model).probe)
    merged_layer: Any = model.get_submodule("model.layers.0.self_attn.k_proj")
    weight = merged_layer.weight.clone()
    hand_over_products(model)
    assert parts(model) == {}
    num_bytes = sum(p.nbytes for p in model.parameters())
    assert num_bytes == sum(p.nbytes for p in build_tiny("qwen2").parameters())
    layer: Any = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert layer.bias.shape == (24,)
    assert isinstance(layer, HandedOverLinear)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(logits(attach(model)[0], 9), expected) or norm_error(logits(lane, 9), expected) < 1e-5
    assert quantize(model, "int8") == 4 * (1 + 1 + 1 + 1) + 1
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj.product"), Int8Linear)
    assert 0 < norm_error(logits(attach(model)[0], 9), expected) < 0.1
    assert 0 < norm_error(layer.weight, weight) < 0.02
    x = torch.randn(1, 5, layer.in_features)
    assert norm_error(layer(x), linear(x, layer.weight, layer.bias)) < 0.02
    assert not torch.equal(layer(x), linear(x, weight, layer.bias))
