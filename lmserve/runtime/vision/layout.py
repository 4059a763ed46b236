"""Where the images of a prompt stand, and which positions its tokens have.

Most models count the tokens of an image as they count text. Those with multimodal rotary embeddings (M-RoPE,
arXiv:2409.12191) give a token three positions: time, height, width; text after an image goes on from the largest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmserve.image_parts import placeholder_id
from lmserve.runtime.interface import PromptImage
from lmserve.runtime.vision.encoder import EncodedImage, ImageEncoder, read_features

GRID = "image_grid_thw"
"""The array among an image's features that says how many patches it has in time, height and width."""


@dataclass(frozen=True, slots=True)
class ImageRows:
    """What goes into the rows of a step that are placeholders of images."""

    rows: list[int] = field(default_factory=list)
    """Rows of the packed step, ascending."""
    images: list[EncodedImage] = field(default_factory=list)
    """What these rows get, one behind the other."""

    def values(self) -> Tensor:
        """(len(rows), hidden size)"""
        return torch.cat([image.rows for image in self.images])

    def deep(self) -> list[Tensor]:
        """(len(rows), hidden size) for each of the first layers; none for most models."""
        return [torch.cat(layer) for layer in zip(*(image.deep for image in self.images), strict=True)]


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """The images of one sequence."""

    images: tuple[PromptImage, ...]
    placeholders: list[NDArray[np.int64]]
    """For each image, where its placeholder tokens stand, ascending."""
    runs: tuple[tuple[int, int], ...]
    """Stretches of adjacent placeholders that see each other, as [start, end)."""
    only_in_windows: bool
    """Whether they do so only in layers with a sliding window."""
    positions: NDArray[np.int64] | None
    """(3, prompt tokens) for models with M-RoPE, else None."""

    def add_rows(
        self, found: ImageRows, encode: Callable[[PromptImage], EncodedImage], row: int, start: int, end: int
    ) -> None:
        """Those of a chunk ``[start, end)`` that begins at row ``row`` of the step."""
        for image, places in zip(self.images, self.placeholders, strict=True):
            first, last = np.searchsorted(places, (start, end))
            if first == last:
                continue
            whole = encode(image)
            part = slice(int(first), int(last))
            found.images.append(EncodedImage(whole.rows[part], tuple(layer[part] for layer in whole.deep)))
            found.rows.extend((places[part] - start + row).tolist())

    def rotary_positions(self, start: int, end: int) -> NDArray[np.int64]:
        """(3, end - start): of the tokens ``[start, end)`` of prompt and output."""
        assert self.positions is not None
        length = self.positions.shape[1]
        after = int(self.positions.max()) + 1 + np.arange(max(start, length) - length, max(end, length) - length)
        return np.concatenate([self.positions[:, start:end], np.tile(after, (3, 1))], axis=1)


class PromptReader:
    """One model's image encoder, and the layout of prompts with images for it.

    ``whole``: the tokens of an image see each other; ``only_in_windows``: in layers with a sliding window alone.
    """

    def __init__(self, model: Any, encoder: ImageEncoder, *, whole: bool, only_in_windows: bool = False) -> None:
        self.encoder = encoder
        self.whole = whole
        self.only_in_windows = only_in_windows
        self.image_token_id = placeholder_id(model.config)
        rope_index = getattr(getattr(model, "model", None), "get_rope_index", None)
        self._rope_index: Any = rope_index
        self._names = frozenset(inspect.signature(rope_index).parameters) if rope_index else frozenset[str]()

    @property
    def has_rotary_grid(self) -> bool:
        """Whether tokens have three positions (M-RoPE)."""
        return self._rope_index is not None

    def read(
        self,
        token_ids: Sequence[int],
        images: tuple[PromptImage, ...],
        features: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> PromptLayout:
        """``token_ids``: the prompt's. ``features``: the images' arrays, if they are not in the images' files."""
        ids = np.asarray(token_ids, np.int64)
        placeholders = [
            np.flatnonzero(ids[image.start : image.end] == self.image_token_id) + image.start for image in images
        ]
        everywhere = np.concatenate(placeholders)
        edges = np.flatnonzero(np.diff(everywhere) > 1) + 1
        runs = tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(everywhere, edges) if run.size and self.whole)
        positions = None
        if self.has_rotary_grid:
            arrays = [read_features(image.file, GRID) for image in images] if features is None else features
            grids = [each[GRID] for each in arrays]
            positions = self.grid_positions(ids, everywhere, torch.cat(grids))
        return PromptLayout(images, placeholders, runs, self.only_in_windows, positions)

    def grid_positions(
        self, ids: NDArray[np.int64], placeholders: NDArray[np.int64], grids: Tensor
    ) -> NDArray[np.int64]:
        """(3, tokens), as the model's own function finds them."""
        kinds = np.zeros_like(ids)
        kinds[placeholders] = 1
        arguments: dict[str, Any] = {"image_grid_thw": grids}
        if "attention_mask" in self._names:
            arguments["attention_mask"] = torch.ones(1, len(ids), dtype=torch.int64)
        if "mm_token_type_ids" in self._names:
            arguments["mm_token_type_ids"] = torch.from_numpy(kinds)[None]
        found, _ = self._rope_index(input_ids=torch.from_numpy(ids)[None], **arguments)
        positions: NDArray[np.int64] = found[:, 0].numpy()
        return positions
