"""Linear layers that read the same input, as one product: queries, keys and values; a gate and what it gates.

Which layers those are is not written down for any model but seen in one forward: children of one module that are
called one after the other with the same tensor. Their weights move into one, of which theirs are views; the first of
them that is called computes for all, and the others take their columns. A column is the sum of the same products as
before, so that nothing changes but, where a library's kernels go by the shape, the rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

GROUPS = "merged_groups"
"""The attribute of a parent that holds its groups."""


@dataclass(slots=True)
class _Home:
    """Holds a product that is no part of the model's tree of modules."""

    product: nn.Linear


class Group:
    """The product that several layers share, and how far its columns have been taken.

    The columns hold for the calls that follow the first one in the order that was seen, with the same tensor, within
    one call of the parent.
    """

    def __init__(self, product: nn.Linear, num_parts: int) -> None:
        self.home: Any = _Home(product)
        """Where the product is looked for."""
        self._num_parts = num_parts
        self._next = 0
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def columns(self, index: int, x: Tensor) -> Tensor | None:
        """The whole product of ``x``, for the part with this index; None if the part has to compute for itself."""
        output: Tensor | None
        if index == 0:
            output = self.home.product(x)
        elif index == self._next and x is self._input:
            output = self._output
        else:
            output = None
        if output is None or index + 1 == self._num_parts:
            self.forget()
        else:
            self._next, self._input, self._output = index + 1, x, output
        return output

    def forget(self) -> None:
        """What was computed may not hold for the next call."""
        self._next, self._input, self._output = 0, None, None


class _Part(nn.Module):
    """Some columns of a group's product."""

    def __init__(self, group: Group, index: int, begin: int, layer: nn.Linear | _Part) -> None:
        """``layer``: whose columns they are."""
        super().__init__()
        self.training = layer.training
        self.in_features: int = layer.in_features
        self.out_features: int = layer.out_features
        self.group, self.index, self.begin, self.end = group, index, begin, begin + layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out); the rows of the result are not adjacent in memory."""
        columns = self.group.columns(self.index, input)
        return self.alone(input) if columns is None else columns[..., self.begin : self.end]

    def alone(self, input: Tensor) -> Tensor:
        """What the layer gives that it stands for."""
        raise NotImplementedError


class MergedLinear(_Part):
    """In place of an ``nn.Linear`` that shares its product with others. For inference only, on this device."""

    def __init__(self, group: Group, index: int, begin: int, layer: nn.Linear) -> None:
        """``layer``: its weight and bias are views of the group's by now."""
        super().__init__(group, index, begin, layer)
        self.weight = layer.weight
        self.bias: nn.Parameter | None = layer.bias

    def alone(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class HandedOverLinear(_Part):
    """The same without a weight of its own: the product is the first part's child, and may become something else."""

    def __init__(self, part: MergedLinear) -> None:
        super().__init__(part.group, part.index, part.begin, part)
        if self.index == 0:
            self.product = self.group.home.product
            self.group.home = self

    @property
    def weight(self) -> Tensor:
        """(out, in), as it counts: for code that looks at the weight instead of calling the layer."""
        whole: Tensor = self.group.home.product.weight
        return whole[self.begin : self.end]

    @property
    def bias(self) -> Tensor | None:
        """(out,)"""
        whole: Tensor | None = self.group.home.product.bias
        return None if whole is None else whole[self.begin : self.end]

    def alone(self, input: Tensor) -> Tensor:
        whole: Tensor = self.group.home.product(input)
        return whole[..., self.begin : self.end]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """That was seen. It holds its input, lest another tensor get the same place."""

    parent: nn.Module
    name: str
    layer: nn.Linear
    x: Tensor
    version: int
    """How often the input had been written to."""

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for calls whose layers can be merged, if one follows the other."""
        weight = self.layer.weight
        return id(self.parent), id(self.x), self.version, weight.dtype, weight.device, self.layer.bias is None


def merge_linears(model: nn.Module, run: Callable[[], object]) -> int:
    """Merges what one forward shows. Comes before anything that changes weights or looks for plain layers.

    Only ``nn.Linear`` itself is merged, and neither a layer with hooks nor one that shares its weight with another. A
    model that cannot bear results whose rows are not adjacent is left as it was.

    Args:
        run: a forward of the model, outside of torch's inference mode, where tensors tell how often they were changed.

    Returns:
        How many groups there are.
    """
    with torch.inference_mode(False), torch.no_grad():
        groups = _find(model, run)
        hooks = [_merge(calls) for calls in groups]
        try:
            run()
        except RuntimeError:
            for calls, hook in zip(groups, hooks, strict=True):
                hook.remove()
                _undo(calls)
            return 0
    return len(groups)


def hand_over_products(model: nn.Module) -> None:
    """For whoever looks for plain layers in order to replace them or their weights: the products become some of them.

    The parts have no weights of their own any more, and the model's state has other names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MergedLinear):
                setattr(parent, name, HandedOverLinear(child))


def _find(model: nn.Module, run: Callable[[], object]) -> list[list[_Call]]:
    """The calls to merge, group by group."""
    calls: list[_Call] = []

    def watch(parent: nn.Module, name: str, layer: nn.Linear) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor):
                version = 0 if args[0].is_inference() else args[0]._version
                calls.append(_Call(parent, name, layer, args[0], version))

        return layer.register_forward_pre_hook(note)

    hooks = [watch(*place) for place in _places(model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(id(call.layer) for call in calls)
    runs = [list(run) for _, run in groupby(calls, key=lambda call: call.key)]
    return [run for run in runs if len(run) > 1 and all(times[id(call.layer)] == 1 for call in run)]


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers that may be merged: parent, name there, layer."""
    owners = Counter(
        tensor.data_ptr()
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()  # by all its names: one that has several is seen more than once
        if type(child) is nn.Linear and _is_plain(child, owners)
    ]


def _is_plain(layer: nn.Linear, owners: Counter[int]) -> bool:
    """Whether it is nothing but a product with a weight of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or "forward" in vars(layer) or layer._compiled_call_impl is not None:
        return False
    return all(
        type(tensor) is nn.Parameter and tensor.device.type != "meta" and owners[tensor.data_ptr()] == 1
        for tensor in layer.parameters()
    )


def _merge(calls: list[_Call]) -> Any:
    """One product for the layers of the calls. Their weights are there twice only while they are copied.

    Returns the handle of a hook of their parent's.
    """
    layers = [call.layer for call in calls]
    sizes = [layer.out_features for layer in layers]
    product = nn.Linear(layers[0].in_features, sum(sizes), bias=layers[0].bias is not None, device="meta")
    for name, _ in list(product.named_parameters()):
        whole = nn.Parameter(torch.cat([getattr(layer, name) for layer in layers]), requires_grad=False)
        setattr(product, name, whole)
        for layer, part in zip(layers, torch.split(whole.detach(), sizes), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
    group = Group(product, len(calls))
    for index, call in enumerate(calls):
        setattr(call.parent, call.name, MergedLinear(group, index, sum(sizes[:index]), call.layer))
    parent: Any = calls[0].parent
    setattr(parent, GROUPS, (*getattr(parent, GROUPS, ()), group))
    return parent.register_forward_pre_hook(_forget)  # a function for all: torch.compile takes layers for alike


def _undo(calls: list[_Call]) -> None:
    """Puts the layers back; their weights stay views of one tensor, which changes nothing."""
    for call in calls:
        setattr(call.parent, call.name, call.layer)


def _forget(parent: Any, _: tuple[Any, ...]) -> None:
    for group in getattr(parent, GROUPS):
        group.forget()
