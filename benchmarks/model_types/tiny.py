"""A tiny model with random weights of any type that transformers lists: float32, on the CPU, the same every time.

Nothing is downloaded: the type's default configuration is shrunk (``shrink``), and little is said by type
(``patches``). Windows, chunks and special tokens are small enough that short prompts meet them.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.model_types.patches import NOT_BUILT, STARTS
from benchmarks.model_types.shrink import shrink
from benchmarks.model_types.sizes import SPREAD

Kind = Literal["causal", "image-text", "encoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_PARAMETERS = 8_000_000
SEED = 1


class CannotBuild(Exception):
    """No tiny model is made of this type; the message says why in one clause."""


def model_types(kind: Kind) -> dict[str, str]:
    """Every type of a kind, and the class that transformers' mapping names for it.

    Encoders are the types with a masked-language head or listed as text encoders, that is, the ones whose last hidden
    state makes an embedding.
    """
    if kind == "causal":
        return dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind == "image-text":
        return dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    base: Any = modeling_auto.MODEL_MAPPING_NAMES
    named = {name: base[name] for name in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    masked = {name: value if isinstance(value, str) else str(value[0]) for name, value in named.items()}
    return {**modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, **masked}


def tiny_config(kind: Kind, model_type: str) -> PreTrainedConfig:
    """The shrunken configuration.

    Raises:
        CannotBuild: this kind of model is not made of the type.
    """
    reason = NOT_BUILT.get((kind, model_type))
    if reason is not None:
        raise CannotBuild(reason)
    make: Any = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = make(**shrink(make(**STARTS.get(model_type, {}))))
    if kind == "encoder":
        config.architectures = [model_types(kind)[model_type]]  # of several classes, this one
        off = ["is_decoder", "causal"]
        if model_types(kind)[model_type].endswith("EncoderModel"):
            off.append("is_encoder_decoder")
        for flag in off:
            if getattr(config, flag, False):
                setattr(config, flag, False)
    return config


def build(kind: Kind, model_type: str) -> PreTrainedModel:
    """The tiny model, ready to run.

    Raises:
        CannotBuild: the type is not made, needs a package that is not here, or stays large.
    """
    config = tiny_config(kind, model_type)
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in _make(kind, config).parameters())
        if size > MAX_PARAMETERS:
            raise CannotBuild(f"its smallest form has {size / 1e6:.0f} million parameters")
        torch.manual_seed(SEED)
        with _telling_what_is_unset():
            model = _make(kind, config)
    except ImportError as error:
        raise CannotBuild(f"needs a package that is not installed: {package(error)}") from error
    _fill(model)
    model.train(False)
    return model


def _make(kind: Kind, config: PreTrainedConfig) -> PreTrainedModel:
    auto: Any = {
        "causal": transformers.AutoModelForCausalLM,
        "image-text": transformers.AutoModelForImageTextToText,
        "encoder": transformers.AutoModel,
    }[kind]
    if kind == "encoder" and config.model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        auto = transformers.AutoModelForTextEncoding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tiny configurations, transformers' own
        made: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    return made


@contextlib.contextmanager
def _telling_what_is_unset() -> Iterator[None]:
    """Memory that nothing fills is not a number, so that it can be found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def _fill(model: PreTrainedModel) -> None:
    """Draw what transformers leaves unset, and shake what is born all alike.

    Biases, sinks and gates are zero at birth, and norms one: a check on such a model would miss them.
    """
    draw = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter).all()):
            parameter.normal_(0.0, SPREAD, generator=draw)
        elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.empty_like(parameter).normal_(0.0, SPREAD, generator=draw))


def package(error: ImportError) -> str:
    """What is missing, as transformers says it."""
    found = re.search(r"requires the ([\w.-]+) library", str(error))
    return found[1] if found else str(error).strip().split("\n")[0][:160]
