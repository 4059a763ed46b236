"""The tiny vision-language folders are what the tests on pictures take them for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageOps
from transformers import PreTrainedModel

from tests.images.tiny_vlms import (
    FAMILIES,
    assistant,
    load_model,
    load_processor,
    model_inputs,
    pictures,
    reference_answer,
    user,
    write_tiny_vlm,
)

TOKENS = 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's model and processor out of its folder, written once."""

    @cache
    def load(family: str) -> tuple[PreTrainedModel, Any]:
        folder = write_tiny_vlm(tmp_path_factory.mktemp(family), family)
        return load_model(folder), load_processor(folder)

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_depends_on_the_picture(family: str, loaded: Any) -> None:
    model, processor = loaded(family)
    asked = [user("What is it?"), *(user(picture, "What is it?") for picture in pictures().values())]
    answers = {tuple(reference_answer(model, processor, [message], TOKENS)) for message in asked}
    assert len(answers) == len(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_of_the_same_size_in_an_earlier_turn_counts(family: str, loaded: Any) -> None:
    model, processor = loaded(family)
    some = pictures()
    last = user(some["red"], "two", some["stripes"], "three")
    answers = {
        tuple(reference_answer(model, processor, [user(first, "one"), assistant("yes"), last], TOKENS))
        for first in (some["disc"], ImageOps.invert(some["disc"]))
    }
    assert len(answers) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_takes_some_tokens_and_each_one_as_many_as_it_needs(family: str, loaded: Any) -> None:
    model, processor = loaded(family)
    config: Any = model.config
    placeholder = getattr(config, "image_token_id", None)
    alone = {
        name: int((model_inputs(processor, [user(picture)])["input_ids"] == placeholder).sum())
        for name, picture in pictures().items()
    }
    assert all(4 <= count <= 70 for count in alone.values())
    assert (len(set(alone.values())) == 1) == (family in {"llava", "gemma3"})
    together = model_inputs(processor, [user(*pictures().values())])["input_ids"]
    assert int((together == placeholder).sum()) == sum(alone.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_small_and_the_same_every_time(family: str, tmp_path: Path) -> None:
    one, two = (write_tiny_vlm(tmp_path / name, family) for name in ("one", "two"))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    assert sum(path.stat().st_size for path in one.iterdir()) < 5_000_000


def test_what_is_said_of_the_text_configuration_goes_into_it(tmp_path: Path) -> None:
    config: Any = load_model(write_tiny_vlm(tmp_path, "llava", num_hidden_layers=2)).config
    assert config.text_config.num_hidden_layers == 2
