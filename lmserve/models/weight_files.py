"""The weight files of a model folder: which ones transformers would load, and what their headers say.

safetensors' header is eight bytes of length and JSON, read here with the standard library: the package of that name
stays below runtime (an import contract), maps whole files and makes an object for each tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmserve.errors import LMServeError

MAX_JSON_BYTES = 100_000_000
"""Also the format's own limit on a safetensors header."""
MAX_DIMENSIONS = 16
"""Against shapes whose product alone takes minutes."""

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PYTORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SIDE_TENSOR = re.compile(
    r"(^|[._])(qzeros|g_idx|scales?|scale_inv|zero_point|weight_shape|weight_format|SCB|absmax|quant_map)$"
    r"|\.quant_state\.bitsandbytes__\w+$"
)
"""What quantizers keep beside the weights: scales, zero points, order, shapes."""


class BadWeights(LMServeError):
    """The weights are damaged or incomplete; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files that hold a folder's weights, each once."""

    format: Literal["safetensors", "pytorch"]
    paths: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """Of the files that links lead to."""
        return sum(path.stat().st_size for path in self.paths)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor in a safetensors file. ``dtype`` is the format's word: BF16, F32, I32, …"""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Quantization:
    """A config's ``quantization_config``."""

    method: str
    bits: int | None
    name: str
    """For people: AWQ 4bit, FP8, MXFP4, …"""


def holds_weights(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names has weights, complete or not."""
    return not {*_SAFETENSORS, *_PYTORCH}.isdisjoint(names)


def find_weight_files(folder: Path) -> WeightFiles:
    """In the order in which transformers looks for them.

    Raises:
        BadWeights: there are none, or one that the index names is missing.
        OSError: the folder cannot be read.
    """
    whole, index = (folder / name for name in _SAFETENSORS)
    if whole.is_file() or index.is_file():
        return WeightFiles("safetensors", (whole,) if whole.is_file() else _shards(index))
    whole, index = (folder / name for name in _PYTORCH)
    if whole.is_file() or index.is_file():
        return WeightFiles("pytorch", (whole,) if whole.is_file() else _shards(index))
    raise BadWeights(f"there are no weights ({_SAFETENSORS[0]}, {_PYTORCH[0]}, or the index of several files)")


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and _all_plain(weight_map) else set()
    if not names:
        raise BadWeights(f"{index.name} names no files")
    paths = tuple(index.parent / name for name in sorted(names))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadWeights(f"the download is not complete: {len(missing)} of {len(paths)} weight files are missing")
    return paths


def _all_plain(weight_map: dict[str, Any]) -> bool:
    """File names, none of which leads out of the folder."""
    return all(isinstance(name, str) and name == os.path.basename(name) != "" for name in weight_map.values())


def read_json_object(path: Path) -> dict[str, Any]:
    """
    Raises:
        BadWeights: the file holds something else, or is too long.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    return _parse_object(data, path.name)


def _parse_object(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise BadWeights(f"{name} is too long")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadWeights(f"{name} is not JSON") from None
    if not isinstance(found, dict):
        raise BadWeights(f"{name} is not a JSON object")
    return found


def read_safetensors_header(path: Path) -> list[TensorHeader]:
    """
    Raises:
        BadWeights: it is no safetensors file, or cut off.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise BadWeights(f"{path.name} is not a safetensors file: damaged, cut off, or only a Git LFS pointer")
        header = _parse_object(file.read(length), f"the header of {path.name}")
    header.pop("__metadata__", None)
    tensors = [_tensor_header(name, entry, path) for name, entry in header.items()]
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > size - 8 - length:
        raise BadWeights(f"the download is not complete: {path.name} is cut off")
    return tensors


def _tensor_header(name: str, entry: Any, path: Path) -> TensorHeader:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if begin <= end:
            if len(shape) <= MAX_DIMENSIONS and all(isinstance(length, int) and length >= 0 for length in shape):
                tensor = TensorHeader(name, dtype, tuple(shape))
                if tensor.num_elements <= 8 * (end - begin):  # no format has less than a bit for each
                    return tensor
    raise BadWeights(f"the header of {path.name} is damaged at {name[:80]!r}")


def count_parameters(tensors: Iterable[TensorHeader], quantization: Quantization | None) -> int | None:
    """Weights that were packed count one by one; None if one is packed in a way that is not known here."""
    total = 0
    for tensor in tensors:
        count = _packed_weights(tensor, quantization) if quantization else _plain_weights(tensor)
        if count is None:
            return None
        total += count
    return total or None


def main_dtype(tensors: Iterable[TensorHeader]) -> str | None:
    """The number format of most weights."""
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += _plain_weights(tensor)
    return elements.most_common(1)[0][0] if elements.total() else None


def _plain_weights(tensor: TensorHeader) -> int:
    """Whole numbers are buffers (position ids), as in transformers' own count."""
    return tensor.num_elements if _is_float(tensor.dtype) else 0


def _packed_weights(tensor: TensorHeader, quantization: Quantization) -> int | None:
    leaf = tensor.name.rpartition(".")[2]
    if _SIDE_TENSOR.search(tensor.name) or tensor.dtype in ("I64", "BOOL"):
        return 0
    if _is_float(tensor.dtype):
        return tensor.num_elements
    if leaf == "weight" and tensor.dtype == "I8":
        return tensor.num_elements
    is_packed = leaf in ("qweight", "weight_packed") or leaf.endswith("_blocks")
    if is_packed or (leaf == "weight" and quantization.method == "bitsandbytes"):
        container = {"U8": 8, "I8": 8, "I32": 32, "U32": 32}.get(tensor.dtype)
        return tensor.num_elements * container // quantization.bits if container and quantization.bits else None
    return None


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("F", "BF"))


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """From a model's configuration; None if its weights are not quantized.

    Raises:
        BadWeights: they are in MLX's format, which transformers does not read.
    """
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and isinstance(method, str):
        return _quantization(method.lower(), found)
    if isinstance(config.get("quantization"), dict):
        raise BadWeights("the weights are quantized for MLX, which transformers does not read")
    return None


def _quantization(method: str, found: dict[str, Any]) -> Quantization:
    if method == "bitsandbytes":
        bits = 4 if found.get("load_in_4bit") or found.get("_load_in_4bit") else 8
        return Quantization(method, bits, f"BNB {bits}bit")
    if method in ("fp8", "fbgemm_fp8"):
        return Quantization(method, 8, "FP8")
    if method == "mxfp4":
        return Quantization(method, 4, "MXFP4")
    if method == "compressed-tensors":
        return _compressed_tensors(found)
    bits = next((found[key] for key in ("bits", "w_bit", "nbits") if isinstance(found.get(key), int)), 0)
    known = bits if 1 <= bits <= 8 else None
    return Quantization(method, known, f"{method.upper()} {known}bit" if known else method.upper())


def _compressed_tensors(found: dict[str, Any]) -> Quantization:
    """One method for many formats; the weights' scheme stands in the first group."""
    method = "compressed-tensors"
    match found.get("config_groups"):
        case {**groups} if groups:
            weights = next(iter(groups.values()))
            match weights:
                case {"weights": {"num_bits": int(bits), "type": str(kind)}} if 1 <= bits <= 8:
                    name = f"{'FP' if kind == 'float' else 'INT'}{bits}"
                    return Quantization(method, bits, name)
    return Quantization(method, None, "COMPRESSED-TENSORS")
