"""Where images stand in a prompt, which rows of a step are theirs, and the positions of M-RoPE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lmserve.runtime.interface import PromptImage
from lmserve.runtime.vision.encoder import EncodedImage, ImageEncoder
from lmserve.runtime.vision.layout import ImageRows, PromptLayout, PromptReader
from tests.images.tiny_vlms import model_inputs
from tests.runtime.vision.chats import NUM_NEW, chats
from tests.runtime.vision.conftest import Families

WITH_M_ROPE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5")
IMAGE = 9
# two images: one in two rows with a break (8) between them and an end (7), one in a row of its own
PROMPT = (1, 2, IMAGE, IMAGE, 8, IMAGE, IMAGE, 7, 3, IMAGE, IMAGE, IMAGE, 4, 5)
IMAGES = (PromptImage(2, 7, "first", ""), PromptImage(9, 12, "second", ""))


class Seer:
    """Has an image encoder that nobody asks here."""

    def __init__(self, **config: int) -> None:
        self.config = SimpleNamespace(**config)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody asks")


def read(*, whole: bool = False) -> PromptLayout:
    model = Seer(image_token_id=IMAGE)
    return PromptReader(model, ImageEncoder(model), whole=whole).read(PROMPT, IMAGES, [])


def encoded(image: PromptImage) -> EncodedImage:
    """Rows that say whose they are and which: 10, 11, 12, 13 and 20, 21, 22; in the second layer 100 more."""
    first, count = {"first": (10, 4), "second": (20, 3)}[image.content]
    rows = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    return EncodedImage(rows, (rows + 100, rows + 200))


def rows_of(start: int, end: int, row: int = 0) -> ImageRows:
    found = ImageRows()
    read().add_rows(found, encoded, row, start, end)
    return found


def test_placeholders_are_told_from_what_stands_between_them() -> None:
    layout = read()
    assert [places.tolist() for places in layout.placeholders] == [[2, 3, 5, 6], [9, 10, 11]]
    assert layout.runs == (), "who sees what stands before has no runs"
    assert layout.positions is None


def test_what_sees_each_other_are_adjacent_placeholders() -> None:
    assert read(whole=True).runs == ((2, 4), (5, 7), (9, 12))


def test_the_configuration_has_two_names_for_the_placeholder() -> None:
    model = Seer(image_token_index=IMAGE)
    layout = PromptReader(model, ImageEncoder(model), whole=False).read(PROMPT, IMAGES, [])
    assert [len(places) for places in layout.placeholders] == [4, 3]


def test_a_placeholder_outside_of_any_image_is_a_token_like_others() -> None:
    model = Seer(image_token_id=IMAGE)
    layout = PromptReader(model, ImageEncoder(model), whole=True).read((IMAGE, *PROMPT[1:]), IMAGES, [])
    assert [places.tolist() for places in layout.placeholders] == [[2, 3, 5, 6], [9, 10, 11]]
    assert layout.runs[0] == (2, 4)


@pytest.mark.parametrize(
    ("start", "end", "rows", "values"),
    [
        (0, 14, [2, 3, 5, 6, 9, 10, 11], [10, 11, 12, 13, 20, 21, 22]),
        (0, 2, [], []),
        (0, 3, [2], [10]),
        (3, 6, [0, 2], [11, 12]),
        (4, 5, [], []),
        (6, 10, [0, 3], [13, 20]),
        (7, 9, [], []),
        (11, 14, [0], [22]),
        (12, 14, [], []),
    ],
)
def test_a_chunk_gets_the_rows_of_its_own_placeholders(
    start: int, end: int, rows: list[int], values: list[int]
) -> None:
    found = rows_of(start, end)
    assert found.rows == rows
    if rows:
        assert found.values()[:, 0].tolist() == values
        assert [layer[:, 0].tolist() for layer in found.deep()] == [
            [value + 100 for value in values],
            [value + 200 for value in values],
        ]
    assert rows_of(start, end, row=30).rows == [row + 30 for row in rows]


def test_chunks_of_several_sequences_stand_one_behind_the_other() -> None:
    found = ImageRows()
    layout = read()
    layout.add_rows(found, encoded, 0, 5, 10)
    layout.add_rows(found, encoded, 5, 0, 4)
    assert found.rows == [0, 1, 4, 7, 8]
    assert found.values()[:, 0].tolist() == [12, 13, 20, 10, 11]


def test_only_images_of_the_chunk_are_asked_for() -> None:
    """The others may be in the prefix cache, or not yet due."""
    asked: list[str] = []

    def encode(image: PromptImage) -> EncodedImage:
        asked.append(image.content)
        return encoded(image)

    for start, end in ((7, 9), (8, 14), (0, 2), (4, 5), (2, 3)):
        read().add_rows(ImageRows(), encode, 0, start, end)
    assert asked == ["second", "first"]


def stock_positions(model: Any, inputs: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(3, tokens): what the language model gets while stock transformers answers; of the last token there is none."""
    found = []

    def note(module: nn.Module, args: Any, arguments: dict[str, Any]) -> None:
        found.append(arguments["position_ids"][-3:, 0])

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
    hook.remove()
    return torch.cat(found, dim=1).numpy()


@pytest.mark.parametrize("name", WITH_M_ROPE)
def test_positions_are_those_of_stock_transformers(name: str, families: Families) -> None:
    family, cases = families(name)
    model: Any = family.model
    reader = PromptReader(model, ImageEncoder(model), whole=False)
    assert reader.has_rotary_grid
    for chat in ("one", "three", "turns"):
        case = cases[chat]
        layout = reader.read(case.token_ids, tuple(case.images))
        inputs = model_inputs(family.processor, chats()[chat])
        arguments = {name: inputs[name] for name in reader._names & inputs.keys()}
        own = model.model.get_rope_index(**arguments)[0][:, 0].numpy()
        length = len(case.token_ids)
        assert layout.positions is not None
        assert np.array_equal(layout.positions, own)
        assert layout.positions.max() < length - 1, "a picture takes fewer positions than tokens"
        expected = stock_positions(model, inputs)
        assert expected.shape == (3, length + NUM_NEW - 1)
        assert np.array_equal(layout.rotary_positions(0, length + NUM_NEW - 1), expected)
        for start, end in (
            (0, 5),
            (3, length),
            (length - 2, length + 3),
            (length, length + 1),
            (length + 2, length + 6),
        ):
            assert np.array_equal(layout.rotary_positions(start, end), expected[:, start:end])


def test_features_may_be_given_instead_of_files(families: Families) -> None:
    family, cases = families("qwen3-vl")
    model: Any = family.model
    reader = PromptReader(model, ImageEncoder(model), whole=False)
    case = cases["three"]
    grids = model_inputs(family.processor, chats()["three"])["image_grid_thw"]
    given = reader.read(case.token_ids, tuple(case.images), [{"image_grid_thw": grid[None]} for grid in grids])
    read_from_files = reader.read(case.token_ids, tuple(case.images))
    assert given.positions is not None
    assert read_from_files.positions is not None
    assert np.array_equal(given.positions, read_from_files.positions)


@pytest.mark.parametrize("name", ["llava", "gemma3", "smolvlm", "mistral3"])
def test_most_models_count_an_image_as_text(name: str, families: Families) -> None:
    family, cases = families(name)
    reader = PromptReader(family.model, ImageEncoder(family.model), whole=False)
    assert not reader.has_rotary_grid
    layout = reader.read(cases["three"].token_ids, tuple(cases["three"].images))
    assert layout.positions is None
    assert [len(places) for places in layout.placeholders] == [
        cases["three"].token_ids[image.start : image.end].count(family.ours.placeholder_id)
        for image in cases["three"].images
    ]
