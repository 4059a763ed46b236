from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors

from lmserve.models.weight_files import (
    BadWeights,
    TensorHeader,
    count_parameters,
    find_weight_files,
    holds_weights,
    main_dtype,
    read_quantization,
    read_safetensors_header,
)


def write_shards(folder: Path, number: int = 2) -> None:
    names = [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
    for i, name in enumerate(names):
        safetensors.save_file({f"w{i}": np.zeros((2, i + 1), np.float32)}, folder / name)
    weight_map = {f"w{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_header_is_what_was_saved(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "a": np.zeros((2, 3), np.float16),
        "b": np.zeros((), np.int64),
        "c": np.zeros((0, 4), np.float32),
    }
    safetensors.save_file(arrays, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert {
        (tensor.name, tensor.dtype, tensor.shape) for tensor in read_safetensors_header(tmp_path / "w.safetensors")
    } == {
        ("a", "F16", (2, 3)),
        ("b", "I64", ()),
        ("c", "F32", (0, 4)),
    }


def test_all_shards_are_found(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    files = find_weight_files(tmp_path)
    assert files.format == "safetensors"
    assert [path.name[:11] for path in files.paths] == ["model-00001", "model-00002", "model-00003"]
    assert files.size_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_a_missing_shard_is_said(tmp_path: Path) -> None:
    write_shards(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadWeights, match="1 of 3 weight files are missing"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x"}}, {"weight_map": {"a": [1]}}])
def test_an_index_must_name_files_beside_it(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadWeights, match="names no files"):
        find_weight_files(tmp_path / "in")


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert find_weight_files(tmp_path).format == "pytorch"
    write_shards(tmp_path)
    assert find_weight_files(tmp_path).format == "safetensors"
    safetensors.save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert [path.name for path in find_weight_files(tmp_path).paths] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["model.safetensors"], True), (["pytorch_model.bin.index.json"], True), (["adapter_model.safetensors"], False)],
)
def test_which_names_are_weights(names: list[str], expected: bool) -> None:
    assert holds_weights([*names, "config.json"]) is expected


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros(3, np.float32)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(BadWeights):
            read_safetensors_header(path)


def file_of(header: object, *, tail: int = 64) -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + bytes(tail)


def entry(**changes: object) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


DAMAGED = {
    "a pointer of Git LFS": (b"version git-lfs/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    "a list": (file_of([1]), "not a JSON object"),
    "no JSON": (struct.pack("<Q", 4) + b"abcd", "is not JSON"),
    "no dtype": (file_of(entry(dtype=None)), "damaged at 'w'"),
    "a negative length": (file_of(entry(shape=[-2])), "damaged at 'w'"),
    "a fraction": (file_of(entry(shape=[2.5])), "damaged at 'w'"),
    "a shape without end": (file_of(entry(shape=[2**62] * 10_000)), "damaged at 'w'"),
    "a shape of many lengths": (file_of(entry(shape=[1] * 17)), "damaged at 'w'"),
    "more elements than bytes": (file_of(entry(shape=[2**40])), "damaged at 'w'"),
    "offsets of nothing": (file_of(entry(data_offsets=[0])), "damaged at 'w'"),
    "offsets backwards": (file_of(entry(data_offsets=[8, 0])), "damaged at 'w'"),
    "beyond the end": (file_of(entry(data_offsets=[60, 68])), "is cut off"),
}


@pytest.mark.parametrize(("data", "complaint"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_said(tmp_path: Path, data: bytes, complaint: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(BadWeights, match=complaint):
        read_safetensors_header(tmp_path / "w.safetensors")


def test_damage_is_an_error_or_another_header(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.save_file({"a": np.zeros((2, 3), np.float16), "b": np.zeros(3, np.float32)}, path)
    data, generator, read = path.read_bytes(), random.Random(0), 0
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data) - 24)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(BadWeights):
            count_parameters(read_safetensors_header(path), None)
            read += 1
    assert 50 < read < 1950


def test_buffers_are_no_parameters() -> None:
    tensors = [
        TensorHeader("embeddings.position_ids", "I64", (1, 512)),
        TensorHeader("w", "BF16", (4, 4)),
        TensorHeader("norm", "F32", (4,)),
    ]
    assert count_parameters(tensors, None) == 20
    assert main_dtype(tensors) == "BF16"
    assert main_dtype(tensors[:1]) is None


AWQ = {"quant_method": "awq", "bits": 4}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_8bit": False}
PACKED = {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}, "format": "pack-quantized"}
FLOAT8 = {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}, "format": "float-quantized"}
NORM = ("norm.weight", "F16", (64,))
QUANTIZED: dict[str, tuple[dict[str, Any], str, list[tuple[str, str, tuple[int, ...]]]]] = {
    "AWQ": (
        AWQ,
        "AWQ 4bit",
        [("q.qweight", "I32", (64, 8)), ("q.qzeros", "I32", (1, 8)), ("q.scales", "F16", (1, 64))],
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        "GPTQ 4bit",
        [("q.qweight", "I32", (8, 64)), ("q.g_idx", "I32", (64,)), ("q.scales", "F16", (1, 64))],
    ),
    "GPTQ of three bits": (
        {"quant_method": "gptq", "bits": 3},
        "GPTQ 3bit",
        [("q.qweight", "I32", (6, 64)), ("q.qzeros", "I32", (1, 6)), ("position_ids", "I64", (1, 512))],
    ),
    "bitsandbytes 4": (
        BNB4,
        "BNB 4bit",
        [
            ("q.weight", "U8", (2048, 1)),
            ("q.weight.absmax", "U8", (64,)),
            ("q.weight.nested_absmax", "F32", (1,)),
            ("q.weight.quant_map", "F32", (16,)),
            ("q.weight.nested_quant_map", "F32", (256,)),
            ("q.weight.quant_state.bitsandbytes__nf4", "U8", (90,)),
        ],
    ),
    "bitsandbytes 8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "BNB 8bit",
        [("q.weight", "I8", (64, 64)), ("q.SCB", "F32", (64,)), ("q.weight_format", "U8", ())],
    ),
    "FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "FP8",
        [("q.weight", "F8_E4M3", (64, 64)), ("q.weight_scale_inv", "F32", (1, 1))],
    ),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        "MXFP4",
        [("mlp.experts.down_proj_blocks", "U8", (64, 2, 16)), ("mlp.experts.down_proj_scales", "U8", (64, 2))],
    ),
    "packed compressed-tensors": (
        {"quant_method": "compressed-tensors", **PACKED},
        "INT4",
        [("q.weight_packed", "I32", (64, 8)), ("q.weight_scale", "F16", (64, 1)), ("q.weight_shape", "I64", (2,))],
    ),
    "float compressed-tensors": (
        {"quant_method": "compressed-tensors", **FLOAT8},
        "FP8",
        [("q.weight", "F8_E4M3", (64, 64)), ("q.weight_scale", "F16", (64, 1)), ("q.input_scale", "F32", ())],
    ),
}


@pytest.mark.parametrize(("config", "name", "tensors"), QUANTIZED.values(), ids=QUANTIZED.keys())
def test_packed_weights_count_one_by_one(
    config: dict[str, Any], name: str, tensors: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    """Each holds one matrix of 64 by 64, and a norm."""
    quantization = read_quantization({"quantization_config": config})
    assert quantization
    assert quantization.name == name
    assert count_parameters([TensorHeader(*tensor) for tensor in [*tensors, NORM]], quantization) == 64 * 64 + 64


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "gptq", "bits": "four"}, "GPTQ"),
        ({"quant_method": "gptq", "bits": 0}, "GPTQ"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": None}}, "COMPRESSED-TENSORS"),
        ({"quant_method": "compressed-tensors"}, "COMPRESSED-TENSORS"),
    ],
)
def test_what_is_packed_in_an_unknown_way_has_no_count(config: dict[str, Any], name: str) -> None:
    quantization = read_quantization({"quantization_config": config})
    assert quantization
    assert quantization.name == name
    assert count_parameters([TensorHeader("q.qweight", "I32", (8, 64)), TensorHeader(*NORM)], quantization) is None


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {"bits": 4}}])
def test_weights_that_are_not_quantized(config: dict[str, Any]) -> None:
    assert read_quantization(config) is None
