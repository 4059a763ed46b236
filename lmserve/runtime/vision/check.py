"""Does the model see images rightly here? Asked once, at load, of the real weights and the model's own processor.

Two pictures in one prompt go through the stock forward and, each encoded alone, through ours in several steps. What an
image's tokens see is found out by comparing: only what stands before them, or each other, too, in all layers or in
those with a sliding window.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
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
        encoder = ImageEncoder(model)
        sample = _make_sample(processor, model, num_slots - block_size)
        if sample is None:
            return ImageCheck("none", reason="the KV cache is too small for two small images")
        with lane.stock_attention():
            stock = model(**sample.stock, use_cache=False).logits[0].float()
        encoded = [encoder.encode_features(features) for features in sample.features]
        readers = [PromptReader(model, ImageEncoder(model), whole=whole) for whole in (False, True)]
        if lane.has_windows:
            readers.append(PromptReader(model, ImageEncoder(model), whole=True, only_in_windows=True))
        errors = []
        for reader in readers:
            ours = _run(lane, reader, sample, encoded, block_size)
            errors.append(((ours - stock).abs().mean() / stock.std()).item())
    except UnsupportedModel as error:
        return ImageCheck("none", reason=str(error))
    except Exception as error:  # whatever its own code makes of it: text is served all the same
        return ImageCheck("none", reason=f"its way with images is another: {type(error).__name__}: {error}")
    # The nearer one: half precision allows so much that in some models either would pass.
    least, reader = min(zip(errors, readers, strict=True), key=itemgetter(0))
    if least <= TOLERANCE[dtype]:
        return ImageCheck("whole" if reader.whole else "causal", reader)
    return ImageCheck(
        "none",
        reason=f"its logits with images differ from the stock ones by {least:.2g} of their spread, "
        f"{TOLERANCE[dtype]:.2g} is allowed",
    )


def _make_sample(processor: ImageProcessor, model: Any, most: int) -> _Sample | None:
    """Of so many tokens at most; None if that is too few."""
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for width, height in PICTURE_SIZES
    ]
    for text in _sample_texts(processor):
        stock = stock_inputs(processor, model, text, pictures)
        token_ids = stock["input_ids"][0].tolist()
        if len(token_ids) <= most:
            break
    else:
        return None
    alone = [processor.process(picture) for picture in pictures]
    features = [{name: torch.from_numpy(array) for name, array in each.arrays.items()} for each in alone]
    counts = [each.num_placeholders for each in alone]
    return _Sample(token_ids, stock, features, locate_images(token_ids, processor.placeholder_id, counts))


def _sample_texts(processor: ImageProcessor) -> Iterator[str]:
    """First as the chat template has it, for in some models positions depend on what it puts around an image; then, if
    that is too long, without anything else."""
    token = processor.image_token
    one, two, rest = ({"type": "text", "text": text} for text in ("One", " two", " and so on"))
    content = [one, {"type": "image"}, two, {"type": "image"}, rest]
    render: Any = processor.processor.apply_chat_template
    try:
        text = str(render([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False))
    except Exception:  # it has none, or one that takes messages of another kind
        text = ""
    if text.count(token) == len(PICTURE_SIZES):
        yield text
    yield f"One{token} two{token} and so on"


def stock_inputs(
    processor: ImageProcessor, model: Any, text: str, pictures: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """What the model's own forward and ``generate`` take for a text with placeholders and its pictures."""
    options: dict[str, Any] = {"return_tensors": "pt"}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        options["return_mm_token_type_ids"] = True  # chat templates ask for them, and some forwards do without
    found: Any = processor.processor(text=[text], images=list(pictures) or None, **options)
    return {name: _move(value, model) for name, value in found.items() if isinstance(value, Tensor)}


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
            [Span(0, end - start, end, table, layout.runs, layout.only_in_windows)],
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
