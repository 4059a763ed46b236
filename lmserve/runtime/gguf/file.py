"""A GGUF file as the loader looks at it: the keys of its architecture, and its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lmserve.errors import ModelLoadFailed
from lmserve.gguf_header import GGUFError, GGUFHeader, TensorInfo, read_gguf_header

SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


class GGUFFile:
    """Owns the header of one file.

    Raises:
        ModelLoadFailed: it cannot be read, or holds a part of a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.header: GGUFHeader = read_gguf_header(path)
        except (GGUFError, OSError) as error:
            raise ModelLoadFailed(f"{path.name}: {error}") from error
        if (parts := self.header.metadata.get("split.count", 1)) != 1:
            raise ModelLoadFailed(
                f"{path.name}: it is one of {parts} parts, and transformers reads whole files: join them with"
                " `llama-gguf-split --merge`"
            )
        self.family = str(self.header.metadata.get("general.architecture"))
        prefix = f"{self.family}."
        said = {**self.header.metadata, **self.header.arrays}
        self.keys: dict[str, Any] = {
            key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)
        }
        """What it says of the model, without the architecture's name before it."""
        self.tensors: dict[str, TensorInfo] = {tensor.name: tensor for tensor in self.header.tensors}

    def get(self, key: str) -> Any:
        """None where the file does not say; the same number for each layer is that number."""
        value = self.keys.get(key)
        return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value

    def vocabulary(self) -> dict[str, Any]:
        """What a configuration says of it, for architectures whose configuration is made here."""
        metadata = self.header.metadata
        return {
            "vocab_size": self.header.array_lengths.get("tokenizer.ggml.tokens"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **{f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()},
        }

    def read(self, name: str) -> Tensor:
        """A tensor in float32, its slowest dimension first."""
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.ggml_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        *outer, inner = reversed(tensor.shape)
        shape = (*outer, inner // block * block_bytes)
        data = np.memmap(self.path, np.uint8, mode="r", offset=self.header.data_offset + tensor.offset, shape=shape)
        return torch.from_numpy(np.array(gguf.dequantize(data, kind), np.float32)).reshape(*outer, inner)

    def not_understood(self, key: str) -> ModelLoadFailed:
        """The refusal of a key."""
        return ModelLoadFailed(
            f"{self.path.name}: it says {self.family}.{key} = {str(self.keys.get(key))[:60]}, which is not understood:"
            " it would be another model"
        )
