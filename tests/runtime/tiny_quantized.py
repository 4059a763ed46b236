"""Tiny quantized checkpoints, written by hand in the layouts that the formats' documents give, and what they say.

Each maker rounds some weights of a tiny model, writes them packed, and gives the model back in float32 with the weights
that the packed ones stand for, worked out here and not by the library that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from transformers import BitNetConfig, PreTrainedModel

from tests.runtime.tiny_models import BASE, build_from_config, build_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""What the sixteen codes of a 4-bit float (E2M1) stand for."""

Packed = tuple[dict[str, Tensor], Tensor]
"""A weight's tensors in the file, by the end of their names, and the weight that they stand for."""


def write(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """``said``: of the quantization, in the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(content, default=str), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def write_linears(
    folder: Path, model: PreTrainedModel, pack: Callable[[str, Tensor], Packed], said: dict[str, Any]
) -> PreTrainedModel:
    """Packs the layers' linear weights; the head and the embeddings stay as they are."""
    tensors = dict(model.state_dict())
    for name, layer in model.base_model.named_modules(prefix=model.base_model_prefix):
        if type(layer) is nn.Linear:
            packed, weight = pack(name, tensors.pop(f"{name}.weight"))
            tensors |= {f"{name}.{end}": tensor for end, tensor in packed.items()}
            layer.weight = nn.Parameter(weight, requires_grad=False)
    write(folder, model, tensors, said)
    return model


def in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes of so many bits, those that come first in a row in the lower bits."""
    groups = codes.to(torch.int64).view(codes.shape[0], -1, 8 // bits)
    return (groups << torch.arange(0, 8, bits)).sum(-1).to(torch.uint8)


def by_blocks(weight: Tensor, rows: int, columns: int) -> Tensor:
    """(out / rows, rows, in / columns, columns)."""
    return weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)


def fp8(folder: Path, **sizes: int) -> PreTrainedModel:
    """As DeepSeek's and Qwen's are: a scale for each block, here of 32 by 32; at the edge it may be a part of one."""

    def pack(name: str, weight: Tensor) -> Packed:
        scale = max_pool2d(weight.abs()[None], 32, ceil_mode=True)[0] / 448
        spread = scale.repeat_interleave(32, 0)[: weight.shape[0]].repeat_interleave(32, 1)[:, : weight.shape[1]]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread

    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "fmt": "e4m3"}
    return write_linears(folder, build_tiny("llama", **{**SIZES, **sizes}), pack, said)


def mxfp8(folder: Path) -> PreTrainedModel:
    """A power of two for each 32 numbers, as a byte."""

    def pack(name: str, weight: Tensor) -> Packed:
        blocks = by_blocks(weight, 1, 32)
        exponent = (blocks.abs().amax((1, 3)) / 448).log2().ceil()
        scale = exponent.exp2()[:, None, :, None]
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        packed = {"weight": codes.view(weight.shape), "weight_scale_inv": (exponent + 127).to(torch.uint8)}
        return packed, (codes.float() * scale).view(weight.shape)

    said = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    return write_linears(folder, build_tiny("qwen3", **SIZES), pack, said)


def mxfp4(folder: Path) -> PreTrainedModel:
    """As gpt-oss is: the experts' weights in 4-bit floats, a power of two for each 32 of them, two to a byte."""
    model = build_tiny("gpt-oss", **SIZES)
    tensors = dict(model.state_dict())
    for name, parameter in list(model.named_parameters()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        del tensors[name]
        weight = parameter.detach().transpose(1, 2)  # the file has it by output
        groups = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        codes = (groups / exponent.exp2()).unsqueeze(-1).sub(FP4).abs().argmin(-1)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
        parameter.data = (FP4[codes] * exponent.exp2()).view(weight.shape).transpose(1, 2).contiguous()
    write(folder, model, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def metal(folder: Path) -> PreTrainedModel:
    """As MLX's are: 4 bits with a scale and a minimum for each 64, eight to a word."""

    def pack(name: str, weight: Tensor) -> Packed:
        groups = weight.view(weight.shape[0], -1, 64)
        low = groups.amin(-1)
        scale = (groups.amax(-1) - low) / 15
        steps = ((groups - low[..., None]) / scale[..., None]).round().to(torch.int64)
        words = (steps.view(weight.shape[0], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
        stands_for = steps * scale[..., None] + low[..., None]
        return {"weight": words.to(torch.uint32), "scales": scale, "qbiases": low}, stands_for.view(weight.shape)

    return write_linears(
        folder, build_tiny("llama", **SIZES), pack, {"quant_method": "metal", "bits": 4, "group_size": 64}
    )


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-1, 0 or 1 for each number, and what they are times."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1), scale


class RoundedInput(nn.Linear):
    """A product with activations in 8 bits, a scale for each row: what BitNet computes."""

    def forward(self, input: Tensor) -> Tensor:
        scale = 127 / input.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return super().forward((input * scale).round().clamp(-128, 127) / scale)


def build_bitnet() -> PreTrainedModel:
    """Each layer has a norm more than Llama's."""
    return build_from_config(BitNetConfig(**{**BASE, **SIZES, "num_hidden_layers": 2}))


def bitnet(folder: Path, linear_class: str = "bitlinear") -> PreTrainedModel:
    """Four numbers of a column to a byte: the first quarter of the rows in the lowest two bits, and so on."""

    def pack(name: str, weight: Tensor) -> Packed:
        signs, scale = ternary(weight)
        quarters = (signs + 1).to(torch.int64).view(4, -1, weight.shape[1])
        packed = (quarters << torch.arange(0, 8, 2)[:, None, None]).sum(0).to(torch.uint8)
        says = scale if linear_class == "autobitlinear" else 1 / scale  # one is multiplied by it, the other divided
        return {"weight": packed, "weight_scale": says.view(1)}, signs * scale

    said = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    model = write_linears(folder, build_bitnet(), pack, said)
    for layer in model.base_model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = RoundedInput
    return model


def gemma(folder: Path) -> PreTrainedModel:
    """4 bits for most layers, two to a byte; 2 and 8 for some; embeddings in 8; a scale for each output or row."""
    model = build_tiny("gemma3", **SIZES)
    kinds = {r"\.down_proj$": {"num_bits": 8}, r"\.v_proj$": {"num_bits": 2}, "embed_tokens$": {"num_bits": 8}}

    def pack(name: str, weight: Tensor) -> Packed:
        bits = next((its["num_bits"] for end, its in kinds.items() if name.endswith(end.strip(r"\.$"))), 4)
        half = 2 ** (bits - 1)
        scale = weight.abs().amax(1, keepdim=True) / half
        steps = (weight / scale).round().clamp(-half, half - 1)
        packed = steps.to(torch.int8) if bits == 8 else in_bytes(steps + half, bits)
        no_scales = {f"{place}_activation_scale": torch.zeros(()) for place in ("input", "output")}
        return {"weight": packed, "weight_scale": scale, **no_scales}, steps * scale

    model = write_linears(folder, model, pack, {})
    table: Any = model.get_input_embeddings()
    packed, weight = pack("embed_tokens", table.weight.detach())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    tensors |= {
        "model.embed_tokens.embedding_quantized": packed["weight"],
        "model.embed_tokens.embedding_scale": packed["weight_scale"],
    }
    table.weight = nn.Parameter(weight, requires_grad=False)
    said = {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True, "module_quant_configs": kinds}
    write(folder, model, tensors, said)
    return model


def compressed(folder: Path, form: str = "pack-quantized") -> PreTrainedModel:
    """As llm-compressor writes them: 4 bits in words with a scale for each 32; 8 bits and 8-bit floats by output, the
    activations rounded by row as well."""
    four = form == "pack-quantized"
    largest = {"pack-quantized": 8, "int-quantized": 127, "float-quantized": 448}[form]

    def pack(name: str, weight: Tensor) -> Packed:
        groups = weight.view(weight.shape[0], -1, 32 if four else weight.shape[1])
        scale = groups.abs().amax(-1) / largest
        codes = groups / scale[..., None]
        codes = codes.to(torch.float8_e4m3fn).float() if form == "float-quantized" else codes.round()
        codes = codes.clamp(-largest, 7 if four else largest).view(weight.shape)
        stands_for = (codes.view(groups.shape) * scale[..., None]).view(weight.shape)
        if four:
            words = in_bytes(codes + 8, 4).view(torch.int32)
            shape = torch.tensor(weight.shape)
            return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}, stands_for
        kind = torch.int8 if form == "int-quantized" else torch.float8_e4m3fn
        return {"weight": codes.to(kind), "weight_scale": scale}, stands_for

    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    rows = None
    if not four:
        kind = "int" if form == "int-quantized" else "float"
        weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True}
        rows = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows, "output_activations": None}
    said = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return write_linears(folder, build_tiny("llama", **SIZES), pack, said)
