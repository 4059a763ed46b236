"""A model's own image encoder, asked for one image at a time.

An image's rows depend on nothing but the image: they are encoded apart from the language model's steps, kept for a
while, and put in the place of the placeholder tokens' embeddings. So a prompt may be cut anywhere, a request that was
preempted or shares an image with another finds it encoded, and no neighbour changes a bit of it.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lmserve.runtime.interface import PromptImage

CACHE_BYTES = 128 * 2**20
"""Of encoded images that are kept. More are taken if one step needs more."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What the language model gets to see of an image."""

    rows: Tensor
    """(placeholder tokens, hidden size): in the place of their embeddings."""
    deep: tuple[Tensor, ...] = ()
    """(placeholder tokens, hidden size) each: added behind the first layers (Qwen3-VL's deepstack)."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.rows, *self.deep))


class ImageEncoder:
    """Owns the encoded images of one model, least recently used first."""

    def __init__(self, model: Any, max_bytes: int = CACHE_BYTES) -> None:
        self.num_encoded = 0
        """Images that went through the encoder since the start."""
        self._model = model
        self._get_features, self._names = _find(model)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._encoded: OrderedDict[str, EncodedImage] = OrderedDict()

    def encode(self, image: PromptImage) -> EncodedImage:
        """Encoded now, or before under the same ``content``."""
        found = self._encoded.get(image.content)
        if found is not None:
            self._encoded.move_to_end(image.content)
            return found
        encoded = self.encode_features(read_features(image.file))
        self._num_bytes += encoded.num_bytes
        self._encoded[image.content] = encoded
        while self._num_bytes > self._max_bytes and len(self._encoded) > 1:
            self._num_bytes -= self._encoded.popitem(last=False)[1].num_bytes
        return encoded

    def encode_features(self, features: dict[str, Tensor]) -> EncodedImage:
        """Of one image: arrays by the names of the encoder's parameters; other names are not for it."""
        arguments = {name: self._prepare(tensor) for name, tensor in features.items() if name in self._names}
        output = self._get_features(**arguments)
        self.num_encoded += 1
        rows = getattr(output, "pooler_output", output)
        deep = getattr(output, "deepstack_features", None) or ()
        return EncodedImage(self._flat(rows), tuple(map(self._flat, deep)))

    def _prepare(self, tensor: Tensor) -> Tensor:
        dtype = self._model.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._model.device, dtype)

    def _flat(self, rows: Any) -> Tensor:
        """Families give a tensor, or one for each (sub-)image."""
        if isinstance(rows, Tensor):
            return rows.reshape(-1, rows.shape[-1]).to(self._model.dtype)
        return torch.cat([self._flat(each) for each in rows])


def _find(model: Any) -> tuple[Any, frozenset[str]]:
    """The model's function from an image's arrays to its rows, and the names that it takes: of its own parameters, and
    of those of the model within to which it hands on what it does not name.

    Raises:
        AttributeError: it has none.
    """
    models: tuple[Any, ...] = (model, getattr(model, "model", None))
    found = [each.get_image_features for each in models if hasattr(each, "get_image_features")]
    if not found:
        raise AttributeError(f"{type(model).__name__} has no get_image_features")
    names = set[str]()
    for function in found:
        parameters = inspect.signature(function).parameters
        names |= parameters.keys()
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            break
    return found[0], frozenset(names)


def read_features(file: str, *names: str) -> dict[str, Tensor]:
    """The arrays of a file of features; only those named, if any are."""
    with safe_open(file, framework="pt") as arrays:
        return {name: arrays.get_tensor(name) for name in names or arrays.keys()}
