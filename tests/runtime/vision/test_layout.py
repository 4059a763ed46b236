"""Where images stand, and the positions of M-RoPE, against the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmserve.runtime.vision.encoder import EncodedImage, ImageEncoder
from lmserve.runtime.vision.layout import ImageRows, PromptReader
from tests.images.tiny_vlms import model_inputs
from tests.runtime.vision.chats import Family, chats


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_positions_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    family = Family(tmp_path, name)
    model: Any = family.model
    reader = PromptReader(model, ImageEncoder(model), whole=False)
    for chat in ("one", "three", "turns"):
        case = family.case(chats()[chat])
        inputs = model_inputs(family.processor, chats()[chat])
        own, delta = model.model.get_rope_index(
            inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=inputs["mm_token_type_ids"]
        )
        layout = reader.read(case.token_ids, tuple(case.images))
        length = len(case.token_ids)
        assert np.array_equal(layout.rotary_positions(0, length), own[:, 0].numpy())
        after = torch.arange(length, length + 5) + delta.item()
        assert np.array_equal(layout.rotary_positions(length, length + 5), after.expand(3, -1).numpy())
        across = np.concatenate([own[:, 0, -2:].numpy(), after.expand(3, -1).numpy()[:, :3]], axis=1)
        assert np.array_equal(layout.rotary_positions(length - 2, length + 3), across)


@pytest.mark.parametrize("whole", [True, False])
def test_runs_are_the_stretches_of_placeholders_where_they_see_each_other(whole: bool, tmp_path: Path) -> None:
    family = Family(tmp_path, "idefics3")
    case = family.case(chats()["one"])
    reader = PromptReader(family.model, ImageEncoder(family.model), whole=whole)
    layout = reader.read(case.token_ids, tuple(case.images))
    assert layout.positions is None
    [places] = layout.placeholders
    assert [case.token_ids[i] for i in places] == [reader.image_token_id] * len(places)
    if whole:
        assert [i for start, end in layout.runs for i in range(start, end)] == places.tolist()
        assert {end - start for start, end in layout.runs} == {4}, "tiles of four tokens, with others between them"
    else:
        assert layout.runs == ()


def test_a_chunk_gets_the_rows_that_fall_into_it(tmp_path: Path) -> None:
    family = Family(tmp_path, "llava")
    case = family.case(chats()["three"])
    reader = PromptReader(family.model, ImageEncoder(family.model), whole=False)
    layout = reader.read(case.token_ids, tuple(case.images))
    encoded = {
        image.content: EncodedImage(torch.arange(36.0)[:, None] + 100 * i) for i, image in enumerate(case.images)
    }
    first, second, _ = case.images
    start, end = first.start + 30, second.start + 3
    found = ImageRows()
    layout.add_rows(found, lambda image: encoded[image.content], 7, start, end)
    assert found.rows == [*range(7, 13), *(7 + second.start - start + i for i in range(3))]
    assert found.values()[:, 0].tolist() == [*map(float, range(30, 36)), 100.0, 101.0, 102.0]
    nothing = ImageRows()
    layout.add_rows(nothing, lambda image: encoded[image.content], 0, 0, first.start)
    assert nothing.rows == []
