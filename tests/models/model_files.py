"""Model files for tests: small, and real enough for what reads their headers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import numpy as safetensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "max_position_embeddings": 4096,
}
WEIGHTS: dict[str, Any] = {"embed.weight": np.zeros((8, 4), np.float16), "lm_head.weight": np.zeros((8, 4), np.float32)}


def package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


def write_folder(
    folder: Path,
    config: Mapping[str, Any] = LLAMA,
    weights: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Path:
    """A model folder; ``files`` are texts, or what becomes JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(dict(weights or WEIGHTS), folder / "model.safetensors")
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_gguf(
    path: Path, family: str = "llama", values: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
) -> Path:
    """Values are int, str or bool."""
    writer = gguf.GGUFWriter(path, family)
    for key, value in (values or {}).items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    for name, array in ({"a.weight": np.zeros((3, 32), np.float32)} if tensors is None else tensors).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def touch(root: Path, *names: str) -> None:
    """Empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def repository(cache: Path, name: str, *files: str, commit: str = "c0", main: str | None = "c0") -> Path:
    """A repository of empty files as huggingface_hub lays it out: blobs, links to them, and the branch's commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    touch(folder, *(f"blobs/{commit}-{file}" for file in files))
    (folder / "snapshots" / commit).mkdir(parents=True)
    for file in files:
        (folder / "snapshots" / commit / file).symlink_to(f"../../blobs/{commit}-{file}")
    if main is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(main)
    return folder
