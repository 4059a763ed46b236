"""What is found out about a model's way with images before it is given any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmserve.config import ModelConfig
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.build import build_runner
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.vision import layout
from tests.images.tiny_vlms import FAMILIES, write_tiny_vlm


def build(folder: Path, family: str) -> PackedModelRunner:
    write_tiny_vlm(folder / family, family)
    config = ModelConfig(model=str(folder / family), kv_cache_memory=2**24, max_model_len=640, dtype="float32")
    return build_runner(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_tokens_of_an_image_see(family: str, tmp_path: Path) -> None:
    info = build(tmp_path, family).info
    assert (info.images, info.no_images) == ("whole" if family == "gemma3" else "causal", "")


def test_a_model_that_sees_otherwise_serves_text_and_says_why_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its forward did something with an image's rows that ours knows nothing of."""
    monkeypatch.setattr(layout.ImageRows, "values", lambda rows: 0.7 * torch.cat([i.rows for i in rows.images]))
    info = build(tmp_path, "llava").info
    assert info.images == "none"
    assert "logits with images differ from the stock ones" in info.no_images


def test_a_processor_that_fails_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no picture for you")

    monkeypatch.setattr(ImageProcessor, "process", fail)
    info = build(tmp_path, "qwen2-vl").info
    assert info.images == "none"
    assert "no picture for you" in info.no_images


def test_a_folder_without_a_processor_serves_text(tmp_path: Path) -> None:
    folder = write_tiny_vlm(tmp_path / "model", "gemma3")
    (folder / "preprocessor_config.json").unlink()
    info = build_runner(ModelConfig(model=str(folder), kv_cache_memory=2**24, max_model_len=640)).info
    assert info.images == "none"
    assert info.no_images.startswith("its image processor cannot be loaded")
