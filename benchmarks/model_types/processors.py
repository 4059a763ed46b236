"""A processor of images for a tiny model of any type, in its folder: the type's own classes, with settings that go with
the shrunken configuration, and a vocabulary of bytes and as many special tokens as the processor asks for.

Settings are taken by their names from the model's configuration; what no name tells is in ``processor_patches``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import image_processing_auto, processing_auto

from benchmarks.model_types.processor_patches import (
    IMAGE_PROCESSOR_CLASSES,
    IMAGE_SETTINGS,
    NO_PROCESSOR,
    PROCESSOR_CLASSES,
    SETTINGS,
)
from benchmarks.model_types.sizes import SPECIAL_TOKENS
from benchmarks.model_types.tiny import CannotBuild, package
from lmserve.image_parts import IMAGE_PARTS, placeholder_id
from lmserve.images.processor import LEFT_OUT, LeftOut, still_class

_auto_processors: Any = processing_auto
_auto_image_processors: Any = image_processing_auto
PROCESSORS: dict[str, str] = _auto_processors.PROCESSOR_MAPPING_NAMES
IMAGE_PROCESSORS: dict[str, dict[str, str]] = _auto_image_processors.IMAGE_PROCESSOR_MAPPING_NAMES
PARTS = (*IMAGE_PARTS, "vit_config", "perceiver_config")
"""Of configurations, that know of images."""
NO_SETTINGS = {"image_processor", "tokenizer", *LEFT_OUT, "chat_template", "kwargs"}
OTHER_NAMES = {
    "merge_size": ("spatial_merge_size",),
    "image_seq_length": ("mm_tokens_per_image", "vision_soft_tokens_per_image"),
    "img_size": ("image_size",),
}
"""What configurations call a setting of processors, besides its own name."""
MANY_PIXELS = 5000
"""An edge as long as this is no edge but a number of pixels (Qwen's kin)."""


def write_processor(model_type: str, model: PreTrainedModel, folder: Path) -> None:
    """The processor's files, beside the model's.

    Raises:
        CannotBuild: transformers has none, or it needs a package that is not installed.
    """
    if model_type in NO_PROCESSOR:
        raise CannotBuild(NO_PROCESSOR[model_type])
    config: Any = model.config
    name = PROCESSOR_CLASSES.get(model_type) or PROCESSORS.get(model_type)
    if name is None:
        raise CannotBuild("transformers names no processor for it")
    image_processor = _image_processor(model_type, config)
    try:
        kind: Any = still_class(str(name))
        settings = _settings(kind, config, model_type)
    except ImportError as error:
        raise CannotBuild(f"needs a package that is not installed: {package(error)}") from error
    vocab_size = config.get_text_config().vocab_size
    left_out = {part: LeftOut() for part in LEFT_OUT if part in kind.get_attributes()}
    parts = {"image_processor": image_processor, **left_out, **settings}
    asked = _asking(vocab_size)
    probe = kind(tokenizer=asked, **parts)
    image_token = getattr(probe, "image_token", "<image>")  # the load says itself what it misses
    for attribute in asked.named:  # what a processor calls so, whatever its tokenizer says (Command A's)
        value = getattr(probe, attribute, None)
        if isinstance(value, str) and value not in asked.named.values():
            asked.named[attribute] = value
    tokenizer = _with_tokens(asked, _place(config, asked, image_token), vocab_size)  # until it is known what is written
    placeholder = _repeated(kind(tokenizer=tokenizer, **parts))
    tokenizer = _with_tokens(asked, _place(config, asked, placeholder, image_token), vocab_size)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": name, **settings}), encoding="utf-8")


class _AskedTokenizer(PreTrainedTokenizerFast):
    """Makes up the special tokens that it is asked for, and remembers them."""

    named: dict[str, str]
    """By the attribute that was asked for."""
    unnamed: dict[str, None]
    """Those whose ids were asked for."""

    def __getattr__(self, name: str) -> Any:
        known = self.__dict__.get("named")
        if known is None or name.startswith("_") or not name.endswith(("_token", "_token_id")):
            return super().__getattr__(name)  # type: ignore[no-untyped-call]
        attribute = name.removesuffix("_id")
        token = known.setdefault(attribute, f"<|{attribute}|>")
        return SPECIAL_TOKENS - 1 if name.endswith("_id") else token

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The same one for all."""
        if "unnamed" not in self.__dict__:
            return super().convert_tokens_to_ids(tokens)
        for token in [tokens] if isinstance(tokens, str) else tokens:
            self.unnamed.setdefault(token)
        return SPECIAL_TOKENS - 1 if isinstance(tokens, str) else [SPECIAL_TOKENS - 1] * len(tokens)


def _asking(vocab_size: int) -> _AskedTokenizer:
    made: _AskedTokenizer = _tokenizer(_AskedTokenizer, [f"<{i}>" for i in range(SPECIAL_TOKENS)], vocab_size)
    made.named, made.unnamed = {}, {}
    return made


def _with_tokens(asked: _AskedTokenizer, specials: list[str], vocab_size: int) -> Any:
    named = {attribute: token for attribute, token in asked.named.items() if token in specials}
    return _tokenizer(PreTrainedTokenizerFast, specials, vocab_size, extra_special_tokens=named)


def _tokenizer(kind: Any, specials: list[str], vocab_size: int, **options: Any) -> Any:
    """Special tokens first, then one for each byte, what is printed in English first; the rest has no room."""
    alphabet = sorted(
        pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii() and letter not in "ĠĊ", letter)
    )
    tokens = [*specials, *alphabet][:vocab_size]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    pad, bos, eos = specials[:3]
    return kind(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=pad, **options)


def _place(config: Any, asked: _AskedTokenizer, placeholder: str, *others: str) -> list[str]:
    """The special tokens in the order of their ids: those that the configuration numbers have its numbers."""
    number = placeholder_id(config)
    wanted = {**asked.named, **{token: token for token in asked.unnamed if token not in asked.named.values()}}
    numbers = {
        name.removesuffix("_id").removesuffix("_index"): value
        for name, value in config.to_dict().items()
        if isinstance(value, int) and not isinstance(value, bool) and 3 <= value < SPECIAL_TOKENS
    }
    placed = {SPECIAL_TOKENS - 1 if number is None else number: placeholder}
    for name, token in wanted.items():
        number = numbers.get(name.strip("<|>"), numbers.get(name.strip("<|>") + "_token"))
        if number is not None and number not in placed and token not in placed.values():
            placed[number] = token
    free = [i for i in range(3, SPECIAL_TOKENS) if i not in placed]
    for token in (*others, *wanted.values()):
        if token not in placed.values() and free:
            placed[free.pop()] = token
    return [placed.get(i, f"<{i}>") for i in range(SPECIAL_TOKENS)]


def _repeated(probe: Any) -> str:
    """The token that stands most often in what the processor writes for an image; what stands for an image before that,
    if it does not say what it writes."""
    image_token = str(getattr(probe, "image_token", "<image>"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    options = {"return_text_replacement_offsets": True, "return_tensors": "pt"}
    try:
        found = probe(text=[image_token], images=[picture], **options)
        text = found["text_replacement_offsets"][0][0]["replacement"]
        found = Counter(re.findall(r"<[^<>]*>|\[[^\[\]]*\]", text))
        (often, count), *_ = found.most_common(1)
        return often if count > 2 * found[image_token] else image_token
    except Exception:
        return image_token


def _image_processor(model_type: str, config: Any) -> Any:
    key = IMAGE_PROCESSOR_CLASSES.get(model_type, model_type)
    names = IMAGE_PROCESSORS.get(key)
    if names is None:
        raise CannotBuild("transformers names no image processor for it")
    kind: Any = getattr(transformers, names.get("pil") or names["torchvision"])
    try:
        default = kind()
    except ImportError as error:
        raise CannotBuild(f"needs a package that is not installed: {package(error)}") from error
    side, patch = _value(config, "image_size") or 32, _value(config, "patch_size") or 8
    area = (patch * (_value(config, "spatial_merge_size") or 2)) ** 2
    settings: dict[str, Any] = {}
    for name in ("size", "crop_size", "max_image_size"):
        size = getattr(default, name, None)
        if (
            size is not None
            and not isinstance(size, int)
            and dict(size).keys() & {"height", "shortest_edge", "longest_edge"}
        ):
            settings[name] = _size(dict(size), side, area)
    for name in ("patch_size", "merge_size", "spatial_merge_size", "temporal_patch_size", "pooling_kernel_size"):
        value = _value(config, name, *OTHER_NAMES.get(name, ()))
        if value is not None and getattr(default, name, None) is not None:
            settings[name] = value if isinstance(getattr(default, name), int) else {"height": value, "width": value}
    if getattr(default, "min_pixels", None):
        settings["min_pixels"], settings["max_pixels"] = 4 * area, 40 * area
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints:
        settings["image_grid_pinpoints"] = pinpoints
    return kind(**{**settings, **IMAGE_SETTINGS.get(model_type, {})})


def _size(size: dict[str, int], side: int, area: int) -> dict[str, int]:
    """In the form of the default one. ``area``: pixels of a token, of which an image has 4 to 40."""
    if "height" in size:
        return {"height": side, "width": side}
    if (size.get("longest_edge") or 0) > MANY_PIXELS:
        return {"shortest_edge": 4 * area, "longest_edge": 40 * area}
    edges = {"shortest_edge": side, "longest_edge": 2 * side if "shortest_edge" in size else side}
    return {name: edges[name] for name in edges if name in size}


def _settings(kind: Any, config: Any, model_type: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in [*inspect.signature(kind.__init__).parameters][1:]:
        value = _value(config, name, *OTHER_NAMES.get(name, ()))
        if name not in NO_SETTINGS and value is not None:
            settings[name] = value
    return {**settings, **SETTINGS.get(model_type, {})}


def _value(config: PreTrainedConfig, *names: str) -> Any:
    """The first number or text under one of the names, in the configuration or a part that knows of images."""
    parts = [config, *(getattr(config, part) for part in PARTS if getattr(config, part, None) is not None)]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                return value
    return None
