"""What a model is, read from its files: type, size, quantization, context, what it can do. Neither torch nor
transformers is needed for it, and no weight is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from lmserve.errors import LMServeError
from lmserve.gguf_header import GGUFError, GGUFHeader, TensorInfo, read_gguf_header
from lmserve.image_parts import has_image_part
from lmserve.models.weight_files import (
    BadWeights,
    count_parameters,
    find_weight_files,
    main_dtype,
    read_json_object,
    read_quantization,
    read_safetensors_header,
)

ModelType = Literal["llm", "vlm", "embeddings", "reranker"]

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_GENERATING = ("BertGenerationDecoder", "NemotronH_Omni_Reasoning_V3")
"""Architectures that continue texts and have names of their own."""
_ENCODERS = frozenset(
    ("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "eurobert", "modernbert", "mpnet")
    + ("nomic_bert", "roberta", "xlm-roberta", "xlm-roberta-xl")
)
"""Families of encoders, for configurations that name no architecture."""
_GGUF_ENCODERS = frozenset(
    ("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert")
    + ("nomic-bert-moe",)
)
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_SPEAKS_OF_TOOLS = re.compile(r"\btools\b")


class NotAModel(LMServeError):
    """What is there cannot be served; the message is the reason, a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without loading it."""

    type: ModelType
    architecture: str
    """transformers' class (LlamaForCausalLM); empty if the files do not say."""
    model_type: str
    """The family: llama, bert, …"""
    num_parameters: int | None
    """As counted in the files: tied weights count as often as they are stored."""
    size_bytes: int
    """Of the weight files."""
    format: Literal["safetensors", "gguf", "pytorch"]
    quantization: str | None
    """BF16, F32, Q4_K_M, AWQ 4bit, …"""
    bits_per_weight: float | None
    context_length: int | None
    """Tokens that the model was made for."""
    capabilities: tuple[str, ...]
    """Out of completion, chat, tools, vision, embeddings, rerank."""


def read_facts(location: Path) -> ModelFacts:
    """Of a model folder, or of a GGUF file (of a split one: its first part).

    Raises:
        NotAModel: there is none, it is damaged or incomplete, or of a kind that lmserve does not serve.
    """
    try:
        if location.is_dir():
            return _folder_facts(location)
        if location.suffix.lower() == ".gguf":
            return _gguf_facts(location)
    except OSError as error:
        raise NotAModel(f"{location.name} cannot be read: {error.strerror or error}") from error
    except (BadWeights, GGUFError) as error:
        raise NotAModel(f"{location.name}: {error}") from error
    raise NotAModel(f"{location.name} is neither a model folder nor a GGUF file")


def gguf_parts(first: Path) -> tuple[Path, ...]:
    """The files of a GGUF model: one, or all parts of a split one, of which ``first`` is the first.

    Raises:
        NotAModel: it is another part, or one is missing.
    """
    split = _SPLIT.fullmatch(first.name)
    if not split:
        return (first,)
    part, count = int(split["part"]), int(split["count"])
    if part != 1:
        raise NotAModel(f"{first.name} is part {part} of {count}; name the first")
    parts = []
    for number in range(1, count + 1):
        parts.append(first.with_name(f"{split['stem']}-{number:05}-of-{count:05}{first.suffix}"))
        if not parts[-1].is_file():
            raise NotAModel(f"{first.name}: part {number} of {count} is missing")
    return tuple(parts)


def is_later_part(name: str) -> bool:
    """Whether a GGUF file of this name only continues another."""
    split = _SPLIT.fullmatch(name)
    return split is not None and int(split["part"]) != 1


def _folder_facts(folder: Path) -> ModelFacts:
    if not (folder / "config.json").is_file():
        raise NotAModel(f"{folder.name}: there is no config.json")
    config = read_json_object(folder / "config.json")
    text_config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    architecture = _first_text(config.get("architectures"))
    kind = _kind(folder, config, text_config, architecture)
    quantization = read_quantization(config) or read_quantization(text_config)
    weights = find_weight_files(folder)
    num_parameters, dtype = None, _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    if weights.format == "safetensors":
        tensors = [tensor for path in weights.paths for tensor in read_safetensors_header(path)]
        num_parameters, dtype = count_parameters(tensors, quantization), main_dtype(tensors)
    return ModelFacts(
        type=kind,
        architecture=architecture,
        model_type=_text(config.get("model_type")),
        num_parameters=num_parameters,
        size_bytes=weights.size_bytes,
        format=weights.format,
        quantization=quantization.name if quantization else dtype,
        bits_per_weight=_bits_per_weight(weights.size_bytes, num_parameters),
        context_length=_context_length(folder, config, text_config, kind),
        capabilities=_capabilities(kind, list(_templates(folder))),
    )


def _kind(folder: Path, config: dict[str, Any], text_config: dict[str, Any], architecture: str) -> ModelType:
    """
    Raises:
        NotAModel: it is none of them.
    """
    name = architecture or _text(config.get("model_type"))
    if not name:
        raise NotAModel(f"{folder.name}: config.json names neither an architecture nor a model type")
    sees = has_image_part(config)
    generates = architecture.endswith(("ForCausalLM", "LMHeadModel")) or architecture in _GENERATING
    conditional = architecture.endswith("ForConditionalGeneration")
    encodes_and_decodes = config.get("is_encoder_decoder") is True or text_config.get("is_encoder_decoder") is True
    if encodes_and_decodes or (conditional and not sees and "audio_config" not in config):
        raise NotAModel(f"{name}: encoder-decoder models are not served")
    scores = architecture.endswith("ForSequenceClassification")
    if (folder / "modules.json").is_file():  # what sentence-transformers writes
        return "reranker" if scores and _is_cross_encoder(folder) else "embeddings"
    if sees and (generates or conditional):
        return "vlm"
    reads_text = isinstance(text_config.get("vocab_size"), int) and not sees
    if generates or (reads_text and not architecture and config.get("model_type") not in _ENCODERS):
        return "llm"
    if scores and reads_text:
        return "reranker"
    encodes = architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining"))
    if reads_text and (encodes or not architecture) and not {"audio_config", "conv_dim", "image_size"} & config.keys():
        return "embeddings"
    raise NotAModel(f"{name}: models of this architecture are not served")


def _is_cross_encoder(folder: Path) -> bool:
    own = _json_or_empty(folder / "sentence_bert_config.json")
    return own.get("transformer_task") == "sequence-classification"


def _context_length(folder: Path, config: dict[str, Any], text_config: dict[str, Any], kind: ModelType) -> int | None:
    length = next(
        (found for part in (text_config, config) for key in _CONTEXT_KEYS if (found := _positive(part.get(key)))), None
    )
    if kind not in ("embeddings", "reranker"):
        return length
    # An encoder's positions are often two more than it takes (RoBERTa counts from its padding on), and
    # sentence-transformers trains on less than that: its own number goes first.
    trained = _positive(_json_or_empty(folder / "sentence_bert_config.json").get("max_seq_length"))
    tokenizer = _positive(_json_or_empty(folder / "tokenizer_config.json").get("model_max_length"))
    return trained or min((number for number in (length, tokenizer) if number), default=None)


def _templates(folder: Path) -> Iterator[str]:
    """The texts of the chat templates, wherever transformers would find them."""
    yield from _template_texts(_json_or_empty(folder / "tokenizer_config.json").get("chat_template"))
    yield from _template_texts(_json_or_empty(folder / "chat_template.json").get("chat_template"))
    for path in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")


def _template_texts(found: Any) -> Iterator[str]:
    """One template, or several with their names."""
    if isinstance(found, str):
        yield found
    elif isinstance(found, list):
        yield from (text for item in found if isinstance(item, dict) and isinstance(text := item.get("template"), str))


def _capabilities(kind: ModelType, templates: Sequence[str]) -> tuple[str, ...]:
    if kind == "embeddings":
        return ("embeddings",)
    if kind == "reranker":
        return ("rerank",)
    found = ["completion"]
    if templates:
        found.append("chat")
    if any(_SPEAKS_OF_TOOLS.search(template) for template in templates):
        found.append("tools")
    if kind == "vlm":
        found.append("vision")
    return tuple(found)


def _gguf_facts(first: Path) -> ModelFacts:
    parts = gguf_parts(first)
    headers = [read_gguf_header(path) for path in parts]
    for path, header in zip(parts, headers, strict=True):
        _check_is_whole(path, header)
    metadata = headers[0].metadata
    tensors = [tensor for header in headers for tensor in header.tensors]
    family = _gguf_family(metadata, first.name)
    size = sum(path.stat().st_size for path in parts)
    num_parameters = sum(tensor.num_elements for tensor in tensors)
    if not 0 < num_parameters <= 8 * size:
        raise NotAModel(f"{first.name}: it has {'more weights than bits' if num_parameters else 'no weights'}")
    pools = _positive(metadata.get(f"{family}.pooling_type")) is not None  # 0 is no pooling
    kind: ModelType = "embeddings" if family in _GGUF_ENCODERS or pools else "llm"
    templates = [
        value
        for key, value in metadata.items()
        if key.partition("tokenizer.chat_template")[:2] == ("", "tokenizer.chat_template") and isinstance(value, str)
    ]
    return ModelFacts(
        type=kind,
        architecture="",
        model_type=family,
        num_parameters=num_parameters,
        size_bytes=size,
        format="gguf",
        quantization=_gguf_quantization(metadata, tensors),
        bits_per_weight=_bits_per_weight(size, num_parameters),
        context_length=_positive(metadata.get(f"{family}.context_length")),
        capabilities=_capabilities(kind, templates),
    )


def _gguf_family(metadata: Mapping[str, str | int | float | bool], name: str) -> str:
    """
    Raises:
        NotAModel: the file holds a part of a model only, or a model that is not served.
    """
    family, holds = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if holds == "mmproj" or family == "clip":
        raise NotAModel(f"{name}: it holds the vision part of a model only")
    if holds != "model":
        raise NotAModel(f"{name}: it holds no model but: {str(holds)[:40]}")
    if not isinstance(family, str) or not family:
        raise NotAModel(f"{name}: it names no architecture")
    if family in ("t5", "t5encoder"):
        raise NotAModel(f"{family}: encoder-decoder models are not served")
    return family


def _check_is_whole(path: Path, header: GGUFHeader) -> None:
    """
    Raises:
        NotAModel: a tensor lies beyond the file's end, as after a download that broke off.
    """
    room = path.stat().st_size - header.data_offset
    for tensor in header.tensors:
        block, block_bytes = GGML_QUANT_SIZES.get(_ggml_type(tensor), (1, 0))
        if tensor.offset + tensor.num_elements // block * block_bytes > room:
            raise NotAModel(f"{path.name}: the download is not complete, {tensor.name[:80]} lies beyond its end")


def _ggml_type(tensor: TensorInfo) -> Any:
    """The package's name for it, or the number if it is newer than the package."""
    try:
        return GGMLQuantizationType(tensor.ggml_type)
    except ValueError:
        return tensor.ggml_type


def _gguf_quantization(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> str | None:
    names = {int(file_type): name for name, file_type in LlamaFileType.__members__.items() if name != "GUESSED"}
    if name := names.get(metadata.get("general.file_type", -1)):
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    elements: Counter[Any] = Counter()
    for tensor in tensors:
        elements[_ggml_type(tensor)] += tensor.num_elements
    most = elements.most_common(1)[0][0]
    return most.name if isinstance(most, GGMLQuantizationType) else None


def _bits_per_weight(size_bytes: int, num_parameters: int | None) -> float | None:
    return round(8 * size_bytes / num_parameters, 1) if num_parameters else None


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _first_text(found: Any) -> str:
    return _text(found[0]) if isinstance(found, list) and found else ""


def _text(found: Any) -> str:
    return found if isinstance(found, str) else ""


def _positive(found: Any) -> int | None:
    """A length, or None: ``tokenizer_config.json`` writes 10**30 for none."""
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**40 else None
