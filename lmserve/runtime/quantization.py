"""Linear layers in 8 and 4 bits: by torch's own operators on a CPU without native products, by torchao elsewhere.

fp8 is for GPUs alone: weights once, by output channel, and on those that multiply such numbers activations by row.

8 bits: weights once, by output channel; activations at each call, by row; both symmetric, so that a product is integers
times two scales (Dettmers et al. 2022, "LLM.int8()", without its separate outliers). A row has a scale of its own: what
stands beside it in a step does not change it.

4 bits: weights only, in groups of 32 along the input with a scale and a minimum each (the layout of GGUF's Q4_1).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.checkpoint_formats import MULTIPLIES_FP8, check_format, checkpoint_quantization

Quantization = Literal["int8", "int4", "fp8"]

LARGEST = 127
GROUP = 32
STEPS = 15
"""Between the smallest and the largest number of a group, with 4 bits."""
OUTPUTS = 16
"""torch's 4-bit products want the outputs in multiples of it."""


class Int8Linear(nn.Module):
    """In place of an ``nn.Linear``. For inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach().float()
        self._scale = (weight.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        # (in, out), contiguous in memory as (out, in): what the kernel reads fastest.
        self._weight = (weight / self._scale[:, None]).round().to(torch.int8).contiguous().t()
        # A copy: a view would keep the whole mapped file.
        self.bias = None if linear.bias is None else linear.bias.detach().float().clone()

    @property
    def weight(self) -> Tensor:
        """(out, in), as it counts: for code that looks at the weight instead of calling the layer."""
        return self._weight.t().float() * self._scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        rows = x.reshape(-1, self.in_features)
        scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        products = torch._int_mm((rows / scale).round().to(torch.int8), self._weight)
        result = products * (scale * self._scale)
        if self.bias is not None:
            result += self.bias
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """In place of an ``nn.Linear`` whose sizes ``fits`` allows. For inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        groups = linear.weight.detach().float().view(self.out_features, -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        steps = ((groups - low) / scale).round().clamp(0, STEPS).to(torch.int32)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.view(self.out_features, -1), 1)
        # The operator counts from the middle of the 16 steps.
        scales = torch.stack([scale.squeeze(-1), (low + 8 * scale).squeeze(-1)], -1).transpose(0, 1)
        self._scales = scales.contiguous().to(linear.weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        return linear.in_features % GROUP == 0 and linear.out_features % OUTPUTS == 0

    @property
    def weight(self) -> Tensor:
        """(out, in), as it counts: for code that looks at the weight instead of calling the layer."""
        columns: Tensor = self(torch.eye(self.in_features, dtype=self._scales.dtype))
        return columns.t() if self.bias is None else columns.t() - self.bias[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the input's dtype."""
        rows = x.reshape(-1, self.in_features)
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._packed, GROUP, self._scales)
        if self.bias is not None:
            result = result + self.bias
        out: Tensor = result.view(*x.shape[:-1], self.out_features)
        return out


def kind_of(linear: nn.Linear, model: nn.Module, kind: Quantization) -> Quantization:
    """How one of the model's layers is quantized.

    The layer that makes the logits keeps 8 bits beside others' 4, as GGUF files have it: what it loses no later layer
    can even out (benchmarks/NOTES.md has the figures).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return "int8" if linear is head and kind == "int4" else kind


def quantize(model: nn.Module, kind: Quantization) -> int:
    """Replaces the model's plain linear layers (a subclass may mean something else). Returns how many."""
    places = [
        (parent, name, child, kind_of(child, model, kind))
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    places = [place for place in places if place[3] == "int8" or Int4Linear.fits(place[2])]
    for parent, name, linear, its_kind in places:
        setattr(parent, name, Int8Linear(linear) if its_kind == "int8" else Int4Linear(linear))
    return len(places)


def quantize_by_torchao(model: nn.Module, kind: Quantization) -> None:
    """Weights only, in 8 bits by output channel or 4 in groups of 32, with the kernels that torchao has for the device;
    activations, too, in fp8 where the device multiplies it.

    Raises:
        ModelLoadFailed: torchao is not installed, or has nothing for this device.
    """
    try:
        torchao: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ModelLoadFailed(
            f"{kind} on this device needs torchao: pip install 'lmserve[quantization]' ({error})"
        ) from error
    places: dict[Quantization, Any] = {"int8": torchao.Int8WeightOnlyConfig(version=2)}
    if kind == "fp8":
        by_row = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
        weights_only = torchao.Float8WeightOnlyConfig()
        weight = next(model.parameters())
        places = {"fp8": by_row if multiplies_fp8(weight.device, weight.dtype) else weights_only}
    if kind == "int4":
        # torch's own kernels; the other layouts need further packages.
        places["int4"] = torchao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    try:
        for its_kind, configuration in places.items():

            def wanted(module: nn.Module, _: str, its_kind: str = its_kind) -> bool:
                return type(module) is nn.Linear and kind_of(module, model, kind) == its_kind

            torchao.quantize_(model, configuration, filter_fn=wanted)
    except (ImportError, NotImplementedError, RuntimeError, ValueError, AssertionError) as error:
        raise ModelLoadFailed(f"torchao cannot bring the model into {kind} here: {error}") from error


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's tensor cores take 8-bit floats, with a scale for each row, for a model in this format: what
    comes out of such products is bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= MULTIPLIES_FP8


def check_quantization(kind: str, device: torch.device, model_config: Any) -> None:
    """Raises ModelLoadFailed for a kind of quantization that the device or the checkpoint does not allow, and for a
    checkpoint whose own kind cannot be loaded on the device. None for a configuration: of a GGUF file."""
    if kind == "fp8" and device.type != "cuda":
        raise ModelLoadFailed(f"quantization fp8 is for NVIDIA GPUs; on {device.type} there are int8 and int4")
    method = checkpoint_quantization(model_config)
    if kind != "none" and method:
        raise ModelLoadFailed(f"quantization {kind}: the checkpoint is quantized already ({method}); leave it at none")
    check_format(model_config, device)


def quantized_bytes(linear: nn.Linear, kind: Quantization, dtype: torch.dtype) -> int:
    """Of a layer's weight once it is in fewer bits."""
    numbers = linear.weight.numel()
    if kind in ("int8", "fp8"):
        return numbers + 8 * linear.out_features
    return numbers // 2 + numbers // GROUP * 4 if Int4Linear.fits(linear) else numbers * dtype.itemsize
