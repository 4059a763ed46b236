"""A model that does not see images here as it does in transformers is found out, and serves text all the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen3VLForConditionalGeneration, Qwen3VLModel

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.images.processor import ImageFeatures, ImageProcessor
from lmserve.runtime.build import assemble_runner
from lmserve.runtime.packed_lane import PackedLane
from lmserve.runtime.self_check import TOLERANCE
from lmserve.runtime.vision.check import stock_inputs
from lmserve.runtime.vision.encoder import EncodedImage, ImageEncoder
from lmserve.runtime.vision.layout import PromptLayout, PromptReader
from tests.images.tiny_vlms import FAMILIES
from tests.runtime.tiny_models import build_tiny
from tests.runtime.vision.chats import ALL_SEE, Case, Family, run
from tests.runtime.vision.conftest import Families


def assert_refuses_images_and_serves_text(engine: EngineCore, cases: dict[str, Case], *reasons: str) -> None:
    info = engine._runner.info
    assert info.images == "none"
    for reason in reasons:
        assert reason in info.no_images
    assert run(engine, [cases["text"]]) == [cases["text"].answer]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_tokens_of_an_image_see_is_found_out(name: str, families: Families) -> None:
    family, _ = families(name)
    info = family.engine()._runner.info
    assert info.images == ("whole" if name in ALL_SEE else "causal")
    assert info.no_images == ""


@pytest.mark.parametrize("name", ["gemma3", "smolvlm"])
def test_of_two_readings_that_would_pass_the_nearer_one_is_taken(
    name: str, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = families(name)
    monkeypatch.setitem(TOLERANCE, torch.float32, 1.0)
    assert family.engine()._runner.info.images == ("whole" if name in ALL_SEE else "causal")


def test_the_comparison_is_of_a_chat(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some models positions depend on what the template puts around an image (Qwen3-Omni)."""
    texts: list[str] = []

    def seen(processor: ImageProcessor, model: Any, text: str, pictures: Any) -> Any:
        texts.append(text)
        return stock_inputs(processor, model, text, pictures)

    monkeypatch.setattr("lmserve.runtime.vision.check.stock_inputs", seen)
    family, _ = families("qwen3-vl")
    assert family.engine()._runner.info.images == "causal"
    [text] = texts
    assert text.startswith("<|im_start|>user\nOne<|vision_start|><|image_pad|><|vision_end|> two<|vision_start|>")
    texts.clear()
    family.engine(kv_tokens=64)
    assert texts[1:] == ["One<|image_pad|> two<|image_pad|> and so on"], "a chat is too long"


def scaled(factor: float) -> Callable[[EncodedImage], EncodedImage]:
    return lambda image: replace(image, rows=image.rows * factor)


def first_row_lost(image: EncodedImage) -> EncodedImage:
    return replace(image, rows=torch.cat([torch.zeros_like(image.rows[:1]), image.rows[1:]]))


def turned_round(image: EncodedImage) -> EncodedImage:
    return replace(image, rows=image.rows.flip(0))


@pytest.mark.parametrize("change", [scaled(0.0), scaled(1.1), first_row_lost, turned_round])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_rows_that_are_not_those_of_the_forward(
    name: str, change: Callable[[EncodedImage], EncodedImage], families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, cases = families(name)
    encode = ImageEncoder.encode_features
    monkeypatch.setattr(ImageEncoder, "encode_features", lambda self, features: change(encode(self, features)))
    assert_refuses_images_and_serves_text(family.engine(), cases, "differ from the stock ones by", "is allowed")


def test_an_encoder_in_which_images_in_company_are_others(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it normalized over all that it is given: an image alone would not be what it is in the prompt."""
    family, cases = families("llava")
    inner: Any = type(family.model.model)
    stock = inner.get_image_features

    @functools.wraps(stock)
    def blended(self: Any, *args: Any, **arguments: Any) -> Any:
        output = stock(self, *args, **arguments)
        rows = output.pooler_output
        mean = torch.stack([each.mean(0) for each in rows]).mean(0)
        output.pooler_output = [each - mean for each in rows]
        return output

    monkeypatch.setattr(inner, "get_image_features", blended)
    assert_refuses_images_and_serves_text(family.engine(), cases, "differ from the stock ones by")


def without_grid(self: PromptReader, ids: Any, placeholders: Any, grids: Any) -> Any:
    """Positions as in text."""
    return torch.arange(len(ids)).expand(3, -1).numpy()


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (PromptReader, "grid_positions", without_grid),
        (PackedLane, "_pass_deep_features", lambda self: None),
    ],
    ids=["positions", "deepstack"],
)
def test_a_part_of_qwen3_vl_that_is_left_out(
    owner: type, name: str, other: Any, families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, cases = families("qwen3-vl")
    monkeypatch.setattr(owner, name, other)
    assert_refuses_images_and_serves_text(family.engine(), cases, "differ from the stock ones by")


def test_images_whose_tokens_would_have_to_see_each_other(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cases = families("gemma3")
    read = PromptReader.read
    monkeypatch.setattr(PromptReader, "read", lambda *args, **more: _blind(read(*args, **more)))
    assert_refuses_images_and_serves_text(family.engine(), cases, "differ from the stock ones by")


def _blind(layout: PromptLayout) -> PromptLayout:
    return replace(layout, runs=())


def test_a_model_whose_encoder_fails(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cases = families("llava")

    def get_image_features(self: Any, pixel_values: Any) -> Any:
        raise NotImplementedError("not here")

    monkeypatch.setattr(LlavaForConditionalGeneration, "get_image_features", get_image_features)
    assert_refuses_images_and_serves_text(
        family.engine(), cases, "its way with images is another: NotImplementedError: not here"
    )


def test_a_model_without_an_encoder_of_its_own(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cases = families("qwen3-vl")
    monkeypatch.delattr(Qwen3VLForConditionalGeneration, "get_image_features")
    assert family.engine()._runner.info.images == "causal", "the model within has one (Janus)"
    monkeypatch.delattr(Qwen3VLModel, "get_image_features")
    assert_refuses_images_and_serves_text(family.engine(), cases, "its way with images is another: AttributeError")


def test_a_processor_that_fails(families: Families, monkeypatch: pytest.MonkeyPatch) -> None:
    family, cases = families("llava")

    def process(self: ImageProcessor, image: Any) -> ImageFeatures:
        raise ValueError("no picture is good enough")

    monkeypatch.setattr(ImageProcessor, "process", process)
    assert_refuses_images_and_serves_text(family.engine(), cases, "ValueError: no picture is good enough")


def test_a_processor_that_writes_more_for_images_in_company(
    families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, cases = families("llava")
    process = ImageProcessor.process

    def one_less(self: ImageProcessor, image: Any) -> ImageFeatures:
        found = process(self, image)
        return replace(found, num_placeholders=found.num_placeholders - 1)

    monkeypatch.setattr(ImageProcessor, "process", one_less)
    assert_refuses_images_and_serves_text(family.engine(), cases, "placeholder tokens for")


def test_a_folder_without_a_processor(families: Families, tmp_path: Path) -> None:
    family, cases = families("llava")
    for file in family.folder.iterdir():
        if file.name not in {"preprocessor_config.json", "processor_config.json"}:
            (tmp_path / file.name).symlink_to(file)
    elsewhere = Family.__new__(Family)
    elsewhere.folder, elsewhere.model = tmp_path, family.model
    assert_refuses_images_and_serves_text(elsewhere.engine(), cases, "image processor")


def test_a_cache_too_small_for_two_pictures(families: Families) -> None:
    family, cases = families("llava")
    kv_tokens = len(cases["text"].token_ids) // 4 * 4 + 16
    assert_refuses_images_and_serves_text(family.engine(kv_tokens=kv_tokens), cases, "too small for two small images")


def test_a_model_for_text_only_has_no_reason() -> None:
    config = ModelConfig(model="tiny", kv_cache_memory=2**20, max_model_len=64, block_size=4)
    info = assemble_runner(build_tiny("llama"), config, torch.float32).info
    assert (info.images, info.no_images) == ("none", "")
