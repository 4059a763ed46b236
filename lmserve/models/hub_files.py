"""Which files of a hub repository a transformers model needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from lmserve.errors import InvalidRequest, ModelNotFound

PREFERRED_QUANTIZATION = "Q4_K_M"
MAX_NAMED = 30
"""Files that a refusal lists."""

_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe", ".py", ".v3"})
_OTHER_FORMATS = frozenset(
    {"original", "onnx", "openvino", "coreml", "flax", "tf", "tflite", "runs", "figures", "assets"}
)
"""Folders that hold the model once more, for others, or nothing of it."""
_WHOLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
_SHARD = {
    ".safetensors": re.compile(r"model-\d+-of-\d+\.safetensors"),
    ".bin": re.compile(r"pytorch_model-\d+-of-\d+\.bin"),
}
_NOT_WEIGHTS = re.compile(r"(?:training_args|optimizer|scheduler|rng_state.*)\.bin|consolidated.*\.safetensors")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_BESIDE_GGUF = re.compile(r"(?:^|/)(?:mmproj|imatrix)[^/]*$", re.IGNORECASE)


def choose_files(names: Iterable[str], quantization: str | None) -> list[str]:
    """The weights in one format, and everything small beside them: configuration, tokenizer, templates, modules.

    safetensors come before PyTorch's .bin, both before GGUF; a ``quantization`` asks for GGUF. Of the weights the whole
    model is taken once: one file before its shards, and neither variants (fp16) nor the authors' own format.

    Raises:
        InvalidRequest: which GGUF file is meant cannot be told; ``param`` is ``quantization``, the message lists them.
        ModelNotFound: there are no weights that transformers reads.
    """
    kept = sorted(name for name in names if not _is_elsewhere(name))
    side = [name for name in kept if PurePosixPath(name).suffix in _SIDE_SUFFIXES]
    ggufs = [name for name in kept if name.endswith(".gguf") and not _BESIDE_GGUF.search(name)]
    if quantization is not None:
        return sorted([*side, *_choose_gguf(ggufs, quantization)])
    for suffix in _WHOLE:
        weights = _choose_weights(kept, suffix)
        if weights:
            return sorted([*side, *weights])
    if ggufs:
        return sorted([*side, *_choose_gguf(ggufs, None)])
    raise ModelNotFound("It has no weights that transformers reads (safetensors, PyTorch's .bin, GGUF).", "model")


def _is_elsewhere(name: str) -> bool:
    path = PurePosixPath(name)
    return any(part in _OTHER_FORMATS or part.startswith((".", "checkpoint-")) for part in path.parts)


def _choose_weights(names: Sequence[str], suffix: str) -> list[str]:
    """The model's own, which stand at the top, and those of modules in folders (sentence-transformers has such)."""
    weights = [name for name in names if name.endswith(suffix) and not _NOT_WEIGHTS.fullmatch(PurePosixPath(name).name)]
    top = [name for name in weights if "/" not in name]
    whole = [name for name in top if name == _WHOLE[suffix]]
    shards = [name for name in top if _SHARD[suffix].fullmatch(name)]
    chosen = whole or shards or top
    in_folders = [name for name in weights if "/" in name and PurePosixPath(name).name == _WHOLE[suffix]]
    return [*chosen, *in_folders] if chosen or in_folders else []


def _choose_gguf(files: Sequence[str], quantization: str | None) -> list[str]:
    """All parts of one model. The parts of a split one share a name but for their number."""
    models: dict[str, list[str]] = {}
    for file in files:
        models.setdefault(_SPLIT.sub("", file), []).append(file)
    listed = ", ".join(list(models)[:MAX_NAMED]) + (", …" if len(models) > MAX_NAMED else "")
    if quantization is not None and not models:
        raise InvalidRequest("quantization is for repositories with GGUF files, and this one has none.", "quantization")
    if quantization is None and len(models) == 1:
        return next(iter(models.values()))
    matching = [name for name in models if _has_in_name(name, quantization or PREFERRED_QUANTIZATION)]
    if len(matching) == 1:
        return models[matching[0]]
    if quantization is None:
        raise InvalidRequest(f"quantization must say which of these GGUF files is meant: {listed}.", "quantization")
    found = f"{len(matching)} GGUF files have" if matching else "No GGUF file has"
    raise InvalidRequest(f"quantization: {found} {quantization!r} in the name. There are: {listed}.", "quantization")


def _has_in_name(name: str, quantization: str) -> bool:
    """As a whole word, so that Q4_K is not Q4_K_M, and F16 is not BF16."""
    word = rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9]|_[A-Za-z0-9])"
    return re.search(word, name, re.IGNORECASE) is not None
