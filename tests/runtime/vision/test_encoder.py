"""What is kept of encoded images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmserve.runtime.interface import PromptImage
from lmserve.runtime.vision.encoder import ImageEncoder, read_features

HIDDEN = 4


class Model:
    """Its encoder gives an image of n pixels n rows of their values; counts."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def get_image_features(self, pixel_values: Tensor, grid: Tensor | None = None) -> Any:
        self.seen.append({"pixel_values"} | ({"grid"} if grid is not None else set()))
        rows = pixel_values.flatten()[:, None].expand(-1, HIDDEN)
        return SimpleNamespace(pooler_output=(rows[:1], rows[1:]), deepstack_features=[[rows + 1], [rows + 2]])


def image(folder: Path, name: str, size: int) -> PromptImage:
    file = folder / name
    save_file({"pixel_values": torch.arange(float(size)), "grid": torch.tensor([1]), "junk": torch.tensor([1])}, file)
    return PromptImage(0, size, name, str(file))


def test_rows_and_deep_features_of_all_parts_and_arrays_by_their_names(tmp_path: Path) -> None:
    model = Model()
    encoded = ImageEncoder(model).encode(image(tmp_path, "a", 3))
    assert encoded.rows.tolist() == [[float(i)] * HIDDEN for i in range(3)]
    assert [layer[2, 0].item() for layer in encoded.deep] == [3.0, 4.0]
    assert model.seen == [{"pixel_values", "grid"}]
    assert read_features(str(tmp_path / "a"), "grid").keys() == {"grid"}


def test_an_image_is_encoded_once_while_it_is_kept(tmp_path: Path) -> None:
    one, two, three = (image(tmp_path, name, 10) for name in "abc")
    size = 3 * 10 * HIDDEN * 4  # rows, and two layers of deep features
    encoder = ImageEncoder(Model(), max_bytes=2 * size)
    for each in (one, two, one, three):  # the third pushes out the one that was used longest ago: two
        encoder.encode(each)
    assert encoder.num_encoded == 3
    encoder.encode(one)
    encoder.encode(three)
    assert encoder.num_encoded == 3
    encoder.encode(two)
    assert encoder.num_encoded == 4


def test_one_that_is_larger_than_all_the_room_is_served_all_the_same(tmp_path: Path) -> None:
    encoder = ImageEncoder(Model(), max_bytes=10)
    large = image(tmp_path, "a", 100)
    assert len(encoder.encode(large).rows) == 100
    encoder.encode(large)
    assert encoder.num_encoded == 1
    encoder.encode(image(tmp_path, "b", 5))
    encoder.encode(large)
    assert encoder.num_encoded == 3


def test_the_file_is_not_read_again_for_what_is_kept(tmp_path: Path) -> None:
    encoder = ImageEncoder(Model())
    one = image(tmp_path, "a", 3)
    first = encoder.encode(one)
    Path(one.file).unlink()
    assert encoder.encode(one) is first
