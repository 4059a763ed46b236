"""Does the model see images rightly here? Asked once, at load, of the real weights and the model's own processor.

Two pictures in one prompt go through the stock forward and, each encoded alone, through ours in several steps. What an
image's tokens see is found out by comparing: only what stands before them, or each other, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmserve.images.placeholders import locate_images
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.attention.base import Span
from lmserve.runtime.interface import ImageReading, NewSequence, PromptImage
from lmserve.runtime.packed_lane import PackedBatch, PackedLane, UnsupportedModel
from lmserve.runtime.self_check import TOLERANCE
from lmserve.runtime.vision.encoder import EncodedImage, ImageEncoder
from lmserve.runtime.vision.layout import ImageRows, PromptReader
from lmserve.sampling_params import SamplingParams

PICTURE_SIZES = ((64, 48), (40, 72))
"""Width and height. Small, but processors that know one size enlarge them."""
CHUNK = 7
"""Tokens of each step where steps may end anywhere: some end inside an image."""


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """What was found: a reader for the model's prompts, or why it is not to have images."""

    reading: ImageReading
    reader: PromptReader | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Sample:
    """A prompt with two images."""

    token_ids: list[int]
    stock: dict[str, Tensor]
    """What the stock forward takes, all images together."""
    features: list[dict[str, Tensor]]
    """Of each image alone."""
    images: list[tuple[int, int]]
    """Where each begins and ends in the prompt."""


def check_images(
    lane: PackedLane, processor: ImageProcessor, block_size: int, num_slots: int, dtype: torch.dtype
) -> ImageCheck:
    """Compares. The lane is attached; blocks from 0 on are overwritten."""
    model = lane.model
    try:
        sample = _make_sample(processor, model)
        if len(sample.token_ids) + block_size > num_slots:
            return ImageCheck("none", reason="the KV cache is too small for two small images")
        with lane.stock_attention():
            stock = model(**sample.stock, use_cache=False).logits[0].float()
        encoder = ImageEncoder(model)
        encoded = [encoder.encode_features(features) for features in sample.features]
        readings: dict[ImageReading, PromptReader] = {
            "causal": PromptReader(model, ImageEncoder(model), whole=False),
            "whole": PromptReader(model, ImageEncoder(model), whole=True),
        }
        errors: dict[ImageReading, float] = {}
        for reading, reader in readings.items():
            ours = _run(lane, reader, sample, encoded, block_size)
            errors[reading] = ((ours - stock).abs().mean() / stock.std()).item()
    except UnsupportedModel as error:
        return ImageCheck("none", reason=str(error))
    except Exception as error:  # whatever its own code makes of it: text is served all the same
        return ImageCheck("none", reason=f"its way with images is another: {type(error).__name__}: {error}")
    # The nearer one: half precision allows so much that in some models either would pass.
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= TOLERANCE[dtype]:
        return ImageCheck(best, readings[best])
    return ImageCheck(
        "none",
        reason=f"its logits with images differ from the stock ones by {errors[best]:.2g} of their spread, "
        f"{TOLERANCE[dtype]:.2g} is allowed",
    )


def _make_sample(processor: ImageProcessor, model: Any) -> _Sample:
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for width, height in PICTURE_SIZES
    ]
    token = processor.image_token
    found: Any = processor.processor(text=[f"One{token} two{token} and so on"], images=pictures, return_tensors="pt")
    token_ids = found["input_ids"][0].tolist()
    alone = [processor.process(picture) for picture in pictures]
    stock = {name: _move(value, model) for name, value in found.items() if isinstance(value, Tensor)}
    features = [{name: torch.from_numpy(array) for name, array in each.arrays.items()} for each in alone]
    counts = [each.num_placeholders for each in alone]
    return _Sample(token_ids, stock, features, locate_images(token_ids, processor.placeholder_id, counts))


def _move(tensor: Tensor, model: Any) -> Tensor:
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)


def _run(
    lane: PackedLane, reader: PromptReader, sample: _Sample, encoded: list[EncodedImage], block_size: int
) -> Tensor:
    """(tokens, vocab) float32 logits from several steps."""
    device = lane.model.device
    ids = np.array(sample.token_ids)
    images = tuple(PromptImage(start, end, str(i), "") for i, (start, end) in enumerate(sample.images))
    layout = reader.read(sample.token_ids, images, sample.features)
    table = list(range(-(-len(ids) // block_size)))
    pieces = []
    start = 0
    while start < len(ids):
        end = min(start + CHUNK, len(ids))
        for first, last in layout.runs:
            end = last if first < end < last else end
        where = np.arange(start, end)
        rows = ImageRows()
        layout.add_rows(rows, lambda image: encoded[int(image.content)], 0, start, end)
        positions = where
        if layout.positions is not None:
            positions = np.concatenate([where[None], layout.rotary_positions(start, end)])
        batch = PackedBatch(
            torch.from_numpy(ids[start:end]).to(device),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(where).to(device),
            torch.arange(end - start, device=device),
            [Span(0, end - start, end, table, layout.runs)],
            rows if rows.rows else None,
            slots=[0],
            saves=[()],
            wanted=range(end - start),
        )
        prompt = tuple(sample.token_ids)
        lane.begin([] if start else [NewSequence(0, prompt, len(prompt), SamplingParams(max_tokens=1), 0)])
        pieces.append(lane.forward(batch).to(torch.float32, copy=True))
        start = end
    return torch.cat(pieces)
