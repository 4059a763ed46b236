"""A model's native program, from its trace to packed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmserve.runtime.attention.base import CacheLayout
from lmserve.runtime.checkpoint_formats import checkpoint_quantization, is_plain
from lmserve.runtime.kv_cache import KVCache
from lmserve.runtime.native.compiler import check_available
from lmserve.runtime.native.graph import Graph
from lmserve.runtime.native.linear import NativeLinear
from lmserve.runtime.native.plan import Plan, Product, plan
from lmserve.runtime.native.program import Limits, Program, compile_segments
from lmserve.runtime.native.trace import NotTraceable, trace
from lmserve.runtime.native.weights import PackedWeight, WeightKind, panel_bytes
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.pages import pieces

FORMATS: dict[torch.dtype, WeightKind] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def build_program(
    lane: PackedLane, cache: KVCache, layout: CacheLayout, limits: Limits, kind: WeightKind | None = None
) -> Program:
    """Traces the lane's model, packs its weights (in 8 or 4 bits if ``kind`` says so), and compiles what runs it.

    The model's linear layers are replaced by ones over the packed weights, which are then there once.

    Raises:
        NotTraceable, NativeUnavailable: there is no native program; the model is as it was.
    """
    check_available()
    model = lane.model
    if model.dtype not in FORMATS:
        raise NotTraceable(f"its number format is {model.dtype}".replace("torch.", ""))
    if method := checkpoint_quantization(model.config):
        # A trace would take apart what is packed, and keep it so: as large as if it had not been quantized.
        raise NotTraceable(f"its weights stay quantized as its files have them ({method})")
    order = {layer: index for index, layer in enumerate(cache.layers)}
    with lane.watched(lambda *args, **kwargs: _watch(order, *args, **kwargs)):
        graph = trace(model, 4 if hasattr(model.base_model, "get_rope_index") else 1)
    made = plan(graph)
    functions = compile_segments(graph, made)
    weights = _pack(model, graph, made, kind or FORMATS[model.dtype])
    return Program(graph, made, functions, list(cache.layers.values()), layout, limits, weights)


def _watch(
    order: dict[int, int],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    layer = order[id(module)]
    attended: Tensor = torch.ops.lmserve.attend(query, key, value, layer, scaling, window or 0, softcap or 0.0, sinks)
    return attended


@torch.no_grad()
def _pack(model: nn.Module, graph: Graph, made: Plan, kind: WeightKind) -> dict[int, PackedWeight]:
    """Packs product after product, and lets go of each plain weight before the next one is packed."""
    places = _linears_by_weight(model)
    packed: dict[int, PackedWeight] = {}
    shapes = [
        (_kind(product, kind), [part.numel for part in product.parts], product.source.meta.numel())
        for product in made.products
    ]
    rooms = pieces([panel_bytes(*shape) for shape in shapes])
    for product, (its_kind, sizes, in_features), room in zip(made.products, shapes, rooms, strict=True):
        weight = PackedWeight(its_kind, sizes, in_features, room=room)
        for index, part in enumerate(product.parts):
            assert part.data is not None
            weight.pack(index, part.data, part.options["bias"], torch.get_num_threads())
            for parent, name in places.get(part.data.data_ptr(), ()):
                setattr(parent, name, NativeLinear(weight, index, model.dtype))  # type: ignore[arg-type]
            part.data = part.options["bias"] = None
        packed[id(product.parts[0])] = weight
    return packed


def _kind(product: Product, kind: WeightKind) -> WeightKind:
    """What makes logits, over the rows whose logits are wanted, keeps 8 bits: ``quantization.kind_of`` says why."""
    return "int8" if kind == "int4" and product.kept else kind


def _linears_by_weight(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where the plain linear layers are, by the address of their weight."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_plain(child):
                found.setdefault(child.weight.data_ptr(), []).append((parent, name))
    return found
