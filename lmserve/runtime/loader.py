"""Loading a model with transformers: where it goes, in which number format, from which kind of place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GgufConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_CLASSES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.logging import EmptyTqdm

from lmserve import __version__
from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.image_parts import IMAGE_PARTS
from lmserve.runtime.checkpoint_formats import check_parts, checkpoint_quantization
from lmserve.runtime.gguf.config import check_all_read, gguf_config
from lmserve.runtime.gguf.model import load_gguf
from lmserve.runtime.quantization import check_quantization

OF_ONE_DTYPE = ("torchao", "bitsandbytes")


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU.

    Raises:
        ModelLoadFailed: the named device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ModelLoadFailed(f"device {name} was asked for, and torch {torch.__version__} finds none")
    return torch.device(name)


def choose_dtype(name: str, checkpoint: torch.dtype | None, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own format where the device is fast at it, else float32.

    A CPU without bfloat16 instructions emulates it at a fraction of float32's speed, and float16 on a CPU is slow from
    a few rows on, so checkpoints in float16 run there in bfloat16 or float32.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if checkpoint in (None, torch.float32):
        return torch.float32
    if device.type == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_instructions()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return checkpoint if checkpoint in (torch.bfloat16, torch.float16) else torch.bfloat16


def dtype_of(config: ModelConfig, source: ModelSource) -> torch.dtype:
    """As ``choose_dtype``. Weights that stay quantized as torchao and bitsandbytes have made them know no other format
    than the checkpoint's own."""
    method = "" if source.is_gguf else checkpoint_quantization(source.config)
    if config.dtype == "auto" and method in OF_ONE_DTYPE and source.checkpoint_dtype is not None:
        return source.checkpoint_dtype
    return choose_dtype(config.dtype, source.checkpoint_dtype, source.device)


def _has_bf16_instructions() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("AVX512") and bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is known of a model before its weights are read, and where it will go."""

    config: Any
    """transformers' configuration."""
    device: torch.device
    checkpoint_dtype: torch.dtype | None
    is_gguf: bool


def read_model_config(config: ModelConfig, subfolder: str = "") -> ModelSource:
    """Raises ModelLoadFailed, with a sentence for the person who wants the model."""
    device = choose_device(config.device)
    source, arguments = _source(config, subfolder)
    with _explained(config):
        read = partial(AutoConfig.from_pretrained, source, **_config_arguments(arguments))
        is_gguf = "gguf_file" in arguments
        model_config = gguf_config(Path(config.model), read) if is_gguf else read()
    return ModelSource(model_config, device, getattr(model_config, "dtype", None), is_gguf)


def reads_images(model_config: Any) -> bool:
    """Whether the architecture has an image encoder beside its language model."""
    known = model_config.model_type in IMAGE_TEXT_CLASSES
    return known and any(getattr(model_config, part, None) is not None for part in IMAGE_PARTS)


def generating_class(model_config: Any) -> Any:
    """Which of transformers' classes of an architecture answers chats: the one that its files name, where there are
    several, and one that no table of transformers has, if they name one (Emu 3's language model)."""
    kind, named = model_config.model_type, next(iter(model_config.architectures or ()), "")
    sees, continues = (names.get(kind) for names in (IMAGE_TEXT_CLASSES, CAUSAL_CLASSES))
    if not sees and not continues and named.endswith("ForCausalLM"):
        return getattr(transformers, named, AutoModelForCausalLM)
    if sees and continues:
        return AutoModelForImageTextToText if named == sees or reads_images(model_config) else AutoModelForCausalLM
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def load_model(
    config: ModelConfig,
    progress: Callable[[float], None] = lambda fraction: None,
    *,
    auto_class: Any = None,
    subfolder: str = "",
    may_lack: Callable[[str], bool] = lambda name: False,
) -> tuple[PreTrainedModel, torch.dtype]:
    """The model on its device, in evaluation mode. ``progress`` hears the share of the weights that has been read.

    ``auto_class``: which of transformers' classes of the architecture is meant; None: the one that answers chats.
    ``subfolder``: where the files are.
    ``may_lack``: whether a weight, by its name, may stay as chance has made it where no file has it.

    Raises:
        ModelLoadFailed: with a sentence for the person who wants the model.
    """
    source, arguments = _source(config, subfolder)
    known = read_model_config(config, subfolder)
    dtype = dtype_of(config, known)
    check_quantization(config.quantization, known.device, None if known.is_gguf else known.config)
    options = {
        "dtype": dtype,
        "device_map": {"": known.device},
        "attn_implementation": _stock_attention(known.config),
        "output_loading_info": True,
    }
    auto_class = auto_class or generating_class(known.config)
    with _explained(config), _watched(progress):
        if known.is_gguf:
            model, report = load_gguf(Path(config.model), known.config, auto_class, {**arguments, **options})
        else:
            model, report = auto_class.from_pretrained(source, **arguments, **options)
    lacking = sorted(name for name in report["missing_keys"] if not may_lack(name))
    if lacking:
        kind = type(model).__name__
        raise ModelLoadFailed(f"{config.model}: as a {kind} it needs weights that its files lack: {lacking[0]}")
    if known.is_gguf:
        check_all_read(model, Path(config.model))
    elif checkpoint_quantization(known.config):
        check_parts(model, report["unexpected_keys"])
    model.train(False).requires_grad_(False)
    return model, dtype


@contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    """transformers' exceptions as one of ours: strangers' files fail there in every way there is."""
    try:
        yield
    except ModelLoadFailed:
        raise
    except Exception as error:
        raise ModelLoadFailed(f"{config.model}: {_first_line(error)}") from error


@contextmanager
def _watched(progress: Callable[[float], None]) -> Iterator[None]:
    """transformers shows its bars through a hook: they are counted, not drawn."""

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _CountedBar(progress, *args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _CountedBar(EmptyTqdm):
    """As much of a tqdm bar as transformers uses; says when another hundredth is done."""

    def __init__(self, progress: Callable[[float], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._progress = progress
        items = args[0] if args else kwargs.get("iterable")
        total = kwargs.get("total") or (len(items) if isinstance(items, Sized) else 0)
        self._total, self._done, self._said = int(total), 0, -1

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():  # type: ignore[no-untyped-call]
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        if self._total and (hundredth := 100 * self._done // self._total) > self._said:
            self._said = hundredth
            self._progress(self._done / self._total)


def read_json(config: ModelConfig, name: str) -> Any:
    """The content of a file in the model's folder or hub repository; None if there is none, or it is no JSON."""
    file = find_file(config, name)
    try:
        return None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_file(config: ModelConfig, name: str) -> Path | None:
    """A file in the model's folder or hub repository, on this machine."""
    path = Path(config.model)
    if path.is_file():
        return None
    if path.exists():
        return path / name if (path / name).is_file() else None
    with _explained(config):
        found = cached_file(
            config.model, name, revision=config.revision or None, _raise_exceptions_for_missing_entries=False
        )
    return None if found is None else Path(found)


def _source(config: ModelConfig, subfolder: str = "") -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is called with: a folder, a GGUF file's folder, or a hub name."""
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    path = Path(config.model)
    if path.suffix == ".gguf" and path.is_file():
        arguments["quantization_config"] = GgufConfig(gguf_file=path.name, dequantize=True)
        arguments["gguf_file"] = path.name
        return str(path.parent), arguments
    if subfolder:
        arguments["subfolder"] = subfolder
    if not path.exists() and config.revision:
        arguments["revision"] = config.revision
    return config.model, arguments


def _config_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "quantization_config"}


def _stock_attention(model_config: Any) -> str | None:
    """The stock attention to compare with. torch's fused one has no softcap: those models go the eager way."""
    text_config = model_config.get_text_config()
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) else None


def native_context_length(model: PreTrainedModel) -> int | None:
    """The context that the model was made for, or None where its configuration does not say."""
    text_config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text_config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def fingerprint(config: ModelConfig, model: PreTrainedModel, dtype: torch.dtype, backend: str) -> str:
    """Short hash of what decides the logits besides the request: while it stays, a seed promises the same answer."""
    device = model.device
    facts = [
        _weights_identity(config.model),
        str(getattr(model.config, "_commit_hash", None)),
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        str(dtype),
        backend,
        transformers.__version__,
        torch.__version__,
        __version__,
    ]
    return "fp_" + hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _weights_identity(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local model's files: cheap, and different when the weights are."""
    path = Path(model)
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.is_file() else []
    return [(file.name, file.stat().st_size, int(file.stat().st_mtime)) for file in files if file.is_file()]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if "ignore_mismatched_sizes" in text:
        return "weights in its files have other sizes than its configuration says"
    return text.splitlines()[0] if text else type(error).__name__
