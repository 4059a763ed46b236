"""What is kept of encoded images, and what an encoder is given and gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmserve.runtime.interface import PromptImage
from lmserve.runtime.vision.encoder import ImageEncoder, read_features

SIZE = 8
ROW_BYTES = SIZE * 4


class Eyes:
    """An image encoder that repeats each pixel over a row; it remembers what it was asked."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Any:
        self.asked.append(pixel_values)
        self.sizes = image_sizes
        return SimpleNamespace(pooler_output=pixel_values.flatten()[:, None].repeat(1, SIZE))


class DeepEyes(Eyes):
    """One that has something for the first layers, too."""

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Any:
        found = super().get_image_features(pixel_values)
        found.deepstack_features = [found.pooler_output + 1, found.pooler_output + 2]
        return found


class Within:
    """A model with one that only the model within has (Janus)."""

    dtype, device = Eyes.dtype, Eyes.device

    def __init__(self) -> None:
        self.model = Eyes()


class Handing(Within):
    """One that hands on what it does not name (Video-LLaMA 3)."""

    def get_image_features(self, pixel_values: Tensor, **rest: Any) -> Any:
        return self.model.get_image_features(pixel_values, **rest)


class Full(Handing):
    """One that names all that it takes: nothing is for the one within."""

    def get_image_features(self, pixel_values: Tensor) -> Any:  # type: ignore[override]
        return self.model.get_image_features(pixel_values)


class Album:
    """Images by name, with as many rows as asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def image(self, name: str, num_rows: int, **others: Tensor) -> PromptImage:
        file = str(self.folder / name)
        save_file({"pixel_values": torch.full((1, num_rows), float(ord(name[0]))), **others}, file)
        return PromptImage(0, num_rows, name, file)


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path)


def kept(encoder: ImageEncoder, images: dict[str, PromptImage]) -> set[str]:
    """Whose rows are there: those that need no file."""
    return {name for name, image in images.items() if image.content in encoder._encoded}


def test_an_image_is_encoded_once_whatever_prompt_it_stands_in(album: Album) -> None:
    eyes = Eyes()
    encoder = ImageEncoder(eyes)
    image = album.image("a", 3)
    first = encoder.encode(image)
    assert first.rows.tolist() == [[float(ord("a"))] * SIZE] * 3
    assert first.deep == ()
    again = encoder.encode(PromptImage(7, 10, image.content, "/another/file/that/is/not/read"))
    assert again is first
    assert (encoder.num_encoded, len(eyes.asked)) == (1, 1)
    encoder.encode(album.image("b", 3))
    assert (encoder.num_encoded, len(eyes.asked)) == (2, 2)


def test_the_least_recently_used_goes(album: Album) -> None:
    encoder = ImageEncoder(Eyes(), max_bytes=3 * 2 * ROW_BYTES)
    images = {name: album.image(name, 2) for name in "abcde"}
    for name in "abcad":
        encoder.encode(images[name])
    assert kept(encoder, images) == {"a", "c", "d"}
    encoder.encode(images["c"])
    encoder.encode(images["e"])
    assert kept(encoder, images) == {"c", "d", "e"}
    assert encoder.num_encoded == 5
    encoder.encode(images["a"])
    assert encoder.num_encoded == 6, "it was gone"


def test_bytes_are_counted_as_images_come_and_go(album: Album) -> None:
    encoder = ImageEncoder(Eyes(), max_bytes=6 * ROW_BYTES)
    images = {name: album.image(name, num_rows) for name, num_rows in (("a", 1), ("b", 2), ("c", 3), ("d", 4))}
    for name in "abc":
        encoder.encode(images[name])
    assert kept(encoder, images) == {"a", "b", "c"}
    assert encoder._num_bytes == 6 * ROW_BYTES, "exactly full"
    encoder.encode(images["d"])
    assert kept(encoder, images) == {"d"}, "six rows had to become two"
    assert encoder._num_bytes == 4 * ROW_BYTES
    encoder.encode(images["b"])
    assert kept(encoder, images) == {"b", "d"}


def test_one_that_is_larger_than_all_that_may_be_kept_is_served(album: Album) -> None:
    encoder = ImageEncoder(Eyes(), max_bytes=6 * ROW_BYTES)
    images = {name: album.image(name, num_rows) for name, num_rows in (("a", 2), ("z", 7), ("b", 1))}
    encoder.encode(images["a"])
    assert encoder.encode(images["z"]).rows.shape == (7, SIZE)
    assert kept(encoder, images) == {"z"}, "the prompt's next chunk needs it again"
    assert encoder.encode(images["z"]).rows.shape == (7, SIZE)
    assert encoder.num_encoded == 2
    encoder.encode(images["b"])
    assert kept(encoder, images) == {"b"}


def test_what_goes_to_the_first_layers_is_kept_and_counted_too(album: Album) -> None:
    encoder = ImageEncoder(DeepEyes(), max_bytes=5 * ROW_BYTES)
    images = {name: album.image(name, 1) for name in "ab"}
    found = encoder.encode(images["a"])
    assert [layer.tolist() for layer in found.deep] == [[[98.0] * SIZE], [[99.0] * SIZE]]
    assert found.num_bytes == 3 * ROW_BYTES
    encoder.encode(images["b"])
    assert kept(encoder, images) == {"b"}


def test_the_encoder_gets_what_it_knows_in_its_own_precision(album: Album) -> None:
    eyes = Eyes()
    eyes.dtype = torch.bfloat16
    encoder = ImageEncoder(eyes)
    sizes = torch.tensor([[1, 2]])
    found = encoder.encode(album.image("a", 2, image_sizes=sizes, num_crops=torch.tensor([3])))
    assert eyes.asked[0].dtype is torch.bfloat16
    assert eyes.sizes is not None
    assert eyes.sizes.dtype is torch.int64, "whole numbers stay what they are"
    assert eyes.sizes.tolist() == sizes.tolist()
    assert found.rows.dtype is torch.bfloat16


def test_rows_come_in_several_shapes() -> None:
    rows = torch.arange(6 * SIZE, dtype=torch.float32).view(6, SIZE)
    shapes = (
        rows,
        rows.view(2, 3, SIZE),
        [rows[:2], rows[2:]],
        (rows[None, :4], rows[None, 4:]),
        [[rows[:1], rows[1:3]], rows[3:]],
    )
    for shape in shapes:
        for output in (shape, SimpleNamespace(pooler_output=shape)):
            eyes: Any = Eyes()
            eyes.get_image_features = lambda pixel_values, output=output: output
            encoder = ImageEncoder(eyes)
            assert torch.equal(encoder.encode_features({"pixel_values": rows}).rows, rows)


def test_only_the_arrays_that_are_asked_for_are_read(album: Album) -> None:
    grid = torch.tensor([[1, 2, 3]])
    file = album.image("a", 2, image_grid_thw=grid).file
    assert read_features(file).keys() == {"pixel_values", "image_grid_thw"}
    [(name, found)] = read_features(file, "image_grid_thw").items()
    assert name == "image_grid_thw"
    assert torch.equal(found, grid)


@pytest.mark.parametrize(("eyes", "is_asked"), [(Within(), True), (Handing(), True), (Full(), False)])
def test_what_the_outer_model_does_not_name_is_for_the_one_within(eyes: Within, is_asked: bool) -> None:
    features = {name: torch.ones(1) for name in ("pixel_values", "image_sizes", "other")}
    ImageEncoder(eyes).encode_features(features)
    assert (eyes.model.sizes is not None) == is_asked


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(AttributeError, match="object has no get_image_features"):
        ImageEncoder(object())
