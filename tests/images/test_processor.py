"""What a model's processor makes of one image."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.model_types.processors import write_processor
from benchmarks.model_types.tiny import build
from lmserve.images.job import ProcessorError
from lmserve.images.processor import LEFT_OUT, ImageFeatures, ImageProcessor, LeftOut
from tests.images.tiny_vlms import FAMILIES, load_processor, model_inputs, pictures, user, write_tiny_vlm

PICTURES = {name: picture.convert("RGB") for name, picture in pictures().items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny_vlm(tmp_path_factory.mktemp("vlm") / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_it_is_what_the_stock_processor_makes_of_a_chat(family: str, folders: dict[str, Path]) -> None:
    stock, ours = load_processor(folders[family]), ImageProcessor.load(str(folders[family]))
    for picture in PICTURES.values():
        features = ours.process(picture)
        inputs = model_inputs(stock, [user("a", picture, "b")])
        assert features.num_placeholders == int((inputs["input_ids"] == ours.placeholder_id).sum())
        assert features.num_placeholders > 0
        assert features.text in stock.tokenizer.decode(inputs["input_ids"][0])
        assert features.detail_honoured
        for name, array in features.arrays.items():
            assert np.array_equal(array, inputs[name].numpy()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hash_tells_images_apart_by_what_the_model_sees(family: str, folders: dict[str, Path]) -> None:
    ours = ImageProcessor.load(str(folders[family]))
    contents = {name: ours.process(picture).content for name, picture in PICTURES.items()}
    assert len(set(contents.values())) == len(contents)
    assert contents == {name: ours.process(picture.copy()).content for name, picture in PICTURES.items()}


@pytest.mark.parametrize(
    ("family", "honoured", "fewer"),
    [("smolvlm", True, True), ("internvl", True, True), ("qwen2-vl", True, False), ("llava", False, False)]
    + [("gemma3", False, False)],
)
def test_low_detail(family: str, honoured: bool, fewer: bool, folders: dict[str, Path]) -> None:
    ours = ImageProcessor.load(str(folders[family]))
    usual, low = ours.process(PICTURES["red"]), ours.process(PICTURES["red"], "low")
    assert low.detail_honoured == honoured
    assert (low.num_placeholders < usual.num_placeholders) == fewer


def test_low_detail_is_at_most_512_pixels_a_side(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ImageProcessor.load(str(folders["qwen2-vl"]))
    seen: list[tuple[int, int]] = []
    real = ours.processor

    def watch(*, images: Any, **options: Any) -> Any:
        seen.append(images[0].size)
        return real(images=images, **options)

    watch.image_processor = real.image_processor  # type: ignore[attr-defined]  # as much of a processor as is asked
    monkeypatch.setattr(ours, "processor", watch)
    large = PICTURES["red"].resize((1600, 800))
    ours.process(large, "low")
    ours.process(large, "high")
    assert seen == [(512, 256), (1600, 800)]
    assert large.size == (1600, 800), "the caller's picture stays as it is"


def load_made_up(model_type: str, folder: Path) -> ImageProcessor:
    """That of a type which no folder of the tests has."""
    model = build("image-text", model_type)
    model.config.save_pretrained(folder)
    write_processor(model_type, model, folder)
    return ImageProcessor.load(str(folder))


@pytest.mark.parametrize("model_type", ["minicpmv4_6", "gemma4", "internvl"])
def test_parts_for_videos_and_sounds_are_left_out(model_type: str, tmp_path: Path) -> None:
    """However the class takes them: by place, by name, or asking at once how they were set."""
    ours = load_made_up(model_type, tmp_path)
    assert ours.process(PICTURES["stripes"]).num_placeholders > 0
    assert {type(getattr(ours.processor, part)) for part in LEFT_OUT if hasattr(ours.processor, part)} == {LeftOut}
    repr(ours.processor)


def test_a_processor_that_does_not_tell_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_made_up("idefics2", tmp_path)
    features = ours.process(PICTURES["disc"])
    tokenizer = ours.processor.tokenizer
    written = tokenizer.encode(features.text, add_special_tokens=False)
    assert written.count(ours.placeholder_id) == features.num_placeholders == 8
    assert len(written) == 10, "with what stands around them"
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: "something else")
    with pytest.raises(ValueError, match="does not tell what it writes for an image"):
        ours.process(PICTURES["disc"])


def test_templates_may_write_something_else_than_the_placeholder(tmp_path: Path) -> None:
    ours = load_made_up("qianfan_ocr", tmp_path)
    assert ours.image_token == "<image>"
    assert ours.processor.image_token != "<image>"
    assert ours.process(PICTURES["red"]).num_placeholders > 0


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "config.json"])
def test_a_folder_that_lacks_a_file(gone: str, tmp_path: Path) -> None:
    folder = write_tiny_vlm(tmp_path / "model", "qwen2-vl")
    (folder / gone).unlink()
    with pytest.raises(ProcessorError, match="cannot be loaded"):
        ImageProcessor.load(str(folder))


def test_features_go_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    roomy.mkdir()
    save = save_file

    def limited(arrays: Any, file: str) -> None:
        if file.startswith(str(full)):
            Path(file).write_bytes(b"half")
            raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
        save(arrays, file)

    monkeypatch.setattr("lmserve.images.processor.save_file", limited)
    features = ImageFeatures({"pixel_values": np.ones((2, 3), np.float32)}, "<image>", 1, True)
    file, num_bytes = features.save((str(full), str(roomy)))
    assert Path(file).parent == roomy
    assert num_bytes == Path(file).stat().st_size
    assert np.array_equal(load_file(file)["pixel_values"], np.ones((2, 3)))
    assert list(full.iterdir()) == [], "nothing half is left"
    with pytest.raises(RuntimeError, match="I/O error"):
        features.save((str(full),))
