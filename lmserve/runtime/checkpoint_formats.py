"""Checkpoints whose weights are quantized already: which of transformers' formats can be loaded here, and what is
refused before any weight is read.

transformers skips a format that it does not know, and parts of weights that it does not expect, with no more than a
warning. Here both are refusals: an answer from such a model would be nonsense.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.utils.hub import cached_file

from lmserve.errors import ModelLoadFailed

NVIDIA = ("cuda",)
MULTIPLIES_FP8 = (8, 9)
"""From this capability on, a GPU does."""
ACTIVATIONS = ("input", "output", "activation", "k_scale", "v_scale", "q_scale")
"""How the names of tensors begin that are about activations or the KV cache: without them weights are what they are."""


@dataclass(frozen=True, slots=True)
class Format:
    """What transformers needs to load checkpoints in it, as its quantizers' code says."""

    packages: tuple[str, ...] = ()
    """As pip names them."""
    devices: tuple[str, ...] = ()
    """Empty: every one."""
    refusal: str = ""
    """What transformers does instead of loading one, on any device."""
    is_widened: Callable[[torch.device], bool] = lambda device: False
    """Whether its weights become ordinary numbers there: while they are read, or at the first forward."""


def _has_no_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < MULTIPLIES_FP8


def _has_no_mxfp4(device: torch.device) -> bool:
    return device.type != "cuda" or not _is_there("kernels")


FORMATS: dict[str, Format] = {
    "aqlm": Format(("aqlm",)),
    "auto-round": Format(("auto-round",)),
    "awq": Format(("gptqmodel",)),
    "bitnet": Format(),
    "bitsandbytes_4bit": Format(("bitsandbytes",)),
    "bitsandbytes_8bit": Format(("bitsandbytes",)),
    "compressed-tensors": Format(("compressed-tensors",), is_widened=lambda device: True),
    "eetq": Format(("kernels",), NVIDIA),
    "fbgemm_fp8": Format(("fbgemm-gpu",), NVIDIA),
    "fouroversix": Format(("fouroversix",)),
    "fp8": Format(is_widened=_has_no_fp8),
    "fp_quant": Format(("fp_quant",), NVIDIA),
    "gemma": Format(),
    "gguf": Format(refusal="reads it from a GGUF file only: name the file, not its folder"),
    "gptq": Format(("optimum", "gptqmodel")),
    "higgs": Format(("flute-kernel", "fast_hadamard_transform"), NVIDIA),
    "hqq": Format(refusal="cannot load such checkpoints yet"),
    "metal": Format(is_widened=lambda device: device.type != "mps"),
    "mxfp4": Format(is_widened=_has_no_mxfp4),
    "mxfp8": Format(is_widened=_has_no_fp8),
    "nvfp4": Format(refusal="cannot load such checkpoints yet"),
    "quanto": Format(refusal="quantizes so while it loads, but has no checkpoints of it"),
    "quark": Format(("amd-quark",)),
    "sinq": Format(("sinq",)),
    "spqr": Format(("spqr_quant",), NVIDIA),
    "torchao": Format(("torchao",)),
    "vptq": Format(("vptq",), NVIDIA),
}
"""By transformers' own names (``AUTO_QUANTIZER_MAPPING``); docs/quantization.md has what has been tried of them."""
MODULES = {"amd-quark": "quark", "flute-kernel": "flute"}
"""Packages that are imported under another name."""


def checkpoint_quantization(model_config: Any) -> str:
    """How the weights in the files are quantized, by the name that the configuration has for it; empty: not at all."""
    method = _said(model_config).get("quant_method")
    return str(getattr(method, "value", method) or "")


def format_of(model_config: Any) -> str:
    """As ``checkpoint_quantization``, by the name that transformers looks up: bitsandbytes are two."""
    said, method = _said(model_config), checkpoint_quantization(model_config)
    if method == "bitsandbytes" or (said and not method):
        bits = {"_4bit": said.get("load_in_4bit"), "_8bit": said.get("load_in_8bit")}
        return next((f"bitsandbytes{kind}" for kind, wanted in bits.items() if wanted), method)
    return method


def check_format(model_config: Any, device: torch.device) -> None:
    """Raises ModelLoadFailed for a quantized checkpoint that transformers loads wrongly on the device, or not at all.

    The sentence names the format and the package, the device or the version that is in the way.
    """
    if not _said(model_config):
        return
    method = format_of(model_config)
    its_weights = f"its weights are quantized already ({method})"
    if not method:
        raise ModelLoadFailed("its weights are quantized already, and its configuration does not say how")
    known = FORMATS.get(method)
    if known is None:
        raise ModelLoadFailed(f"{its_weights}, in a format that transformers {transformers.__version__} cannot load")
    if known.refusal:
        raise ModelLoadFailed(f"{its_weights}, and transformers {transformers.__version__} {known.refusal}")
    if known.devices and device.type not in known.devices:
        raise ModelLoadFailed(
            f"{its_weights}, which transformers runs on NVIDIA GPUs only; the device is {device.type}"
        )
    lacking = [package for package in known.packages if not _is_there(package)]
    if lacking:
        raise ModelLoadFailed(f"{its_weights}, which needs a further package: pip install {' '.join(lacking)}")
    if method in ("fp8", "mxfp8") and known.is_widened(device):
        _check_blocks(_said(model_config).get("weight_block_size"), _folder(model_config), its_weights)


def is_widened(model_config: Any, device: torch.device) -> bool:
    """Whether the weights of a quantized checkpoint take as much memory on the device as if they were not quantized."""
    method = format_of(model_config)
    if method == "bitnet" and _said(model_config).get("linear_class") == "autobitlinear":
        return True
    return method in FORMATS and FORMATS[method].is_widened(device)


def check_parts(model: nn.Module, left_out: Iterable[str]) -> None:
    """``left_out``: names in the files of a quantized checkpoint for which the loaded model has no place.

    Raises:
        ModelLoadFailed: one of them is a part of a weight that the model has. Without its scales, say, a weight is made
            of bare codes.
    """
    parts = _parts_of_weights(model, left_out)
    if parts:
        raise ModelLoadFailed(f"its weights are quantized in a layout that transformers does not read: {parts[0]}")


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is ``nn.Linear`` and nothing else, so that another product with its weight may take its place.

    A subclass may mean something else; so may a forward of the layer's own (compressed-tensors rounds activations in
    it), and a weight of a kind of its own holds its numbers in other tensors (torchao).
    """
    return type(layer) is nn.Linear and "forward" not in vars(layer) and type(layer.weight) is nn.Parameter


def _said(model_config: Any) -> dict[str, Any]:
    """What a configuration says of the quantization: its own, or its language model's."""
    text_config = getattr(model_config, "get_text_config", lambda: None)()
    found = getattr(model_config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    return (found if isinstance(found, dict) else vars(found)) if found is not None else {}


def _check_blocks(block: Any, folder: Path | None, its_weights: str) -> None:
    """Raises ModelLoadFailed where transformers would multiply numbers by another block's scale: it spreads the scales
    evenly over a weight, though the last block may be smaller than the others."""
    if not isinstance(block, list | tuple) or folder is None:
        return
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, scales in shapes.items():
        weight = shapes.get(name.removesuffix("_scale_inv"), [])[-2:]
        if not name.endswith(".weight_scale_inv") or len(scales) != 2:
            continue
        for size, count, step in zip(weight, scales, block, strict=False):
            if 1 < count == -(-size // step) and size % step:
                raise ModelLoadFailed(
                    f"{its_weights} in blocks of {step}, of which {size} is no multiple ({name}): where it "
                    f"has no products in 8-bit floats, transformers {transformers.__version__} mistakes the blocks"
                )


def _folder(model_config: Any) -> Path | None:
    """Where the files are that a configuration was read with, on this machine."""
    name = str(getattr(model_config, "_name_or_path", ""))
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    found = cached_file(
        name,
        "config.json",
        revision=getattr(model_config, "_commit_hash", None),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent


def _parts_of_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that belong to a layer of the model which has a weight, and are not about activations."""
    layers = dict(model.named_modules())
    return sorted(
        name
        for parent, _, last, name in ((*name.rpartition("."), name) for name in names)
        if getattr(layers.get(parent), "weight", None) is not None and not last.startswith(ACTIVATIONS)
    )


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(MODULES.get(package, package.replace("-", "_"))) is not None
