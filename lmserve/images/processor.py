"""A model's own processor, asked for one image at a time.

transformers makes two things of an image: the arrays that the model's image encoder takes, and the text that stands for
it in a prompt, placeholder tokens and all. Both depend on nothing but the image, so that an image is worked on once,
wherever it stands.

Its image processors come in several kinds, whose results differ a little; the one for Pillow is used wherever there is
one, so that an answer does not depend on what else is installed. The parts for videos and sounds, which need more
libraries, are left out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.utils.hub import cached_file

from lmserve.image_parts import placeholder_id
from lmserve.images.job import Detail, ProcessorError
from lmserve.images.pixtral import PixtralProcessor

LOW_DETAIL_PIXELS = 512
"""Longest side of an image in low detail, as OpenAI has it."""
_WITHOUT_EXTRAS = {"SmolVLMProcessor": "Idefics3Processor"}
"""Processors that want a library which only videos need, and those that write the same for an image."""
LEFT_OUT = ("video_processor", "feature_extractor")
"""Parts of processors that no image goes through."""
_CLASS_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image, as the model wants it."""

    arrays: dict[str, NDArray[Any]]
    """By the names of the image encoder's parameters."""
    text: str
    """What stands for it in a prompt."""
    num_placeholders: int
    """Tokens in ``text`` that the encoder's rows replace."""
    detail_honoured: bool
    """Whether the model's processor can look at images less closely, where that was asked for."""

    @property
    def content(self) -> str:
        """Hash of the arrays: equal for images that are the same to the model."""
        digest = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]

    def save(self, folders: tuple[str, ...]) -> tuple[str, int]:
        """A new file with the arrays, and its bytes. It goes into the first folder that has room: a container's folder
        in memory has 64 MiB."""
        for folder in folders:
            file = os.path.join(folder, uuid.uuid4().hex)
            try:
                save_file(self.arrays, file)
            except Exception as error:  # the library's own kind, also for a full disk
                with contextlib.suppress(OSError):
                    os.remove(file)
                if folder == folders[-1] or os.strerror(errno.ENOSPC) not in str(error):
                    raise
            else:
                return file, os.path.getsize(file)
        raise AssertionError("no folder was named")


class ImageProcessor:
    """One model's processor."""

    def __init__(self, processor: Any, placeholder_id: int) -> None:
        self.image_token: str = getattr(processor, "image_placeholder_token", None) or processor.image_token
        """What chat templates write for an image."""
        self.placeholder_id = placeholder_id
        """The token whose embeddings the encoder's rows replace."""
        self.processor = processor
        self._text_names = {*processor.tokenizer.model_input_names, "mm_token_type_ids", "token_type_ids"}

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False, revision: str = "") -> ImageProcessor:
        """
        Raises:
            ProcessorError: the model has none that works here.
        """
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
        try:
            processor = _load(path, options)
            config: Any = AutoConfig.from_pretrained(path, **options)
        except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProcessorError(f"its image processor cannot be loaded: {_first_line(error)}") from error
        placeholder = placeholder_id(config)
        if getattr(processor, "image_token", None) is None or not isinstance(placeholder, int):
            raise ProcessorError(f"{type(processor).__name__} does not say which token stands for an image")
        return cls(processor, placeholder)

    def process(self, image: Image.Image, detail: Detail = "auto") -> ImageFeatures:
        """Raises what the processor raises."""
        options: dict[str, Any] = {}
        honoured = True
        if detail == "low":
            image, options = self._less_closely(image)
            honoured = bool(options) or self._has_longest_edge()
        found = self.processor(
            text=[self.image_token],
            images=[image],
            return_tensors="np",
            return_text_replacement_offsets=True,
            add_special_tokens=False,
            **options,
        )
        offsets = found.pop("text_replacement_offsets", None)
        token_ids = np.asarray(found["input_ids"])[0]
        text = self._as_text(token_ids.tolist()) if offsets is None else offsets[0][0]["replacement"]
        arrays = {name: np.asarray(value) for name, value in found.items() if name not in self._text_names}
        count = int((token_ids == self.placeholder_id).sum())
        return ImageFeatures(arrays, text, count, honoured)

    def _as_text(self, token_ids: list[int]) -> str:
        """What a processor has written that does not tell (Idefics 2's)."""
        tokenizer = self.processor.tokenizer
        text: str = tokenizer.decode(token_ids, skip_special_tokens=False)
        if tokenizer.encode(text, add_special_tokens=False) != token_ids:
            raise ValueError(f"{type(self.processor).__name__} does not tell what it writes for an image")
        return text

    def _less_closely(self, image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
        """A smaller image, and the processor told not to cut it into tiles."""
        tiling = ("do_image_splitting", "crop_to_patches")
        options = {name: False for name in tiling if getattr(self.processor.image_processor, name, None)}
        if max(image.size) > LOW_DETAIL_PIXELS:
            image = image.copy()
            image.thumbnail((LOW_DETAIL_PIXELS, LOW_DETAIL_PIXELS))
        return image, options

    def _has_longest_edge(self) -> bool:
        """Whether the processor keeps a small image small."""
        return bool(getattr(getattr(self.processor.image_processor, "size", None), "longest_edge", None))


def _load(path: str, options: dict[str, Any]) -> Any:
    auto_processor: Any = AutoProcessor  # neither is typed
    auto_image_processor: Any = AutoImageProcessor
    try:
        processor = still_class(_class_name(path, options)).from_pretrained(path, **options)
    except (AttributeError, ImportError, OSError, TypeError, ValueError):  # its files name none, or one of their own
        processor = auto_processor.from_pretrained(path, **options)
    if not hasattr(processor, "image_processor"):
        raise ProcessorError("it has no image processor")
    processor.image_processor = auto_image_processor.from_pretrained(path, backend="pil", **options)
    return processor


class LeftOut(dict[str, Any]):
    """In the place of a part: some processors ask at once how theirs was set, and all write of what they consist."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def still_class(name: str) -> Any:
    """The processor class of this name, with nothing in the place of its parts for videos and sounds.

    Raises:
        AttributeError: transformers has no such class.
    """
    if name == PixtralProcessor.__name__:
        return PixtralProcessor
    if name in _WITHOUT_EXTRAS:
        return getattr(transformers, _WITHOUT_EXTRAS[name])
    real: Any = getattr(transformers, name)
    shown = [part for part in real.get_attributes() if part not in LEFT_OUT]
    reader: Any = type(name, (real,), {"get_attributes": classmethod(lambda _: shown)})

    def read(_: type, *arguments: Any, **named: Any) -> list[Any]:
        found = dict(zip(shown, reader._get_arguments_from_pretrained(*arguments, **named), strict=True))
        return [found.get(part, LeftOut()) for part in real.get_attributes()]

    def check(self: Any, part: str, value: Any) -> Any:
        return LeftOut if part in LEFT_OUT else real.check_argument_for_proper_class(self, part, value)

    return type(
        name, (real,), {"_get_arguments_from_pretrained": classmethod(read), "check_argument_for_proper_class": check}
    )


def _class_name(path: str, options: dict[str, Any]) -> str:
    """Of the model's processor; empty if its files name none."""
    return next((found for file in _CLASS_FILES if (found := _processor_class(path, file, options))), "")


def _processor_class(path: str, file: str, options: dict[str, Any]) -> str | None:
    found = cached_file(path, file, revision=options["revision"], _raise_exceptions_for_missing_entries=False)
    content = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    name = content.get("processor_class") if isinstance(content, dict) else None
    return name if isinstance(name, str) else None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
