"""The words of a GGUF file: its tokenizer, chat templates, the tokens that end an answer, sampling defaults.

transformers builds the tokenizer. Two things of it are ours. How a byte-level vocabulary's texts are cut before they
are merged a file says by a name only; for names that transformers does not know it takes GPT-2's way, and the model
reads other tokens than it has learned. And a file names one end, while models stop at several (llama.cpp knows them by
their texts, and so do we).
"""

from __future__ import annotations

import importlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from lmserve.errors import ModelLoadFailed
from lmserve.gguf_header import GGUFError, GGUFHeader, read_gguf_header

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
SPLITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "phi-2", "olmo", "jais", "trillion", "exaone4", "gigachat"), (GPT2,)),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "roberta-bpe", "a.x-4.0", "mellum"), (GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"), (r"\p{N}", GPT2)),
    "minerva-7b": (r"\p{N}", GPT2),
    **dict.fromkeys(("stablelm2", "hunyuan"), (QWEN2,)),
    "falcon": FALCON,
    "deepseek-coder": DEEPSEEK_CODER,
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
}
"""How texts are cut, one after the other, by the name that a file has for it: those of llama.cpp (``llama-vocab.cpp``)
that transformers' table lacks."""
KNOWN = "transformers.integrations.gguf.gguf_tokenizer_mapping"
ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
    }
)
"""Special tokens that end an answer, whatever a file says."""
BETWEEN = ("<|end|>", {"<|return|>", "<|call|>"})
"""A token that ends a part of an answer only, in models that have these for whole ones."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""What a file has under ``general.sampling``, by the name that a generation config has for it."""
TEMPLATE = "tokenizer.chat_template"


def load_gguf_tokenizer(path: Path) -> tuple[Any, list[int], dict[str, Any]]:
    """transformers' tokenizer, the ids that end an answer, and what there is of a generation config.

    Raises:
        ModelLoadFailed: the file is damaged, or its texts are cut in a way that is not known.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  (takes seconds, as everything of transformers)

    try:
        header = read_gguf_header(path)
    except (GGUFError, OSError) as error:
        raise ModelLoadFailed(f"{path.name}: {error}") from error
    splits = _splits(path, header)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if splits:
        _cut(tokenizer.backend_tokenizer, splits)
    templates = {
        key.removeprefix(TEMPLATE).lstrip(".") or "default": value
        for key, value in header.metadata.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    tokenizer.chat_template = templates.get("default") if set(templates) <= {"default"} else templates
    sampling = {name: header.metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    return tokenizer, _ends(header, tokenizer), {name: value for name, value in sampling.items() if value is not None}


def _splits(path: Path, header: GGUFHeader) -> tuple[str, ...]:
    """Empty: as transformers does it."""
    name = header.metadata.get("tokenizer.ggml.pre")
    if name is None or header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return ()
    if name in SPLITS:
        return SPLITS[str(name)]
    if (known := _known_to_transformers()) is not None and name not in known:
        raise ModelLoadFailed(
            f"{path.name}: its texts are cut in the way {str(name)[:40]!r} (tokenizer.ggml.pre), which is not known:"
            " the model would read other tokens than it has learned"
        )
    return ()


def _known_to_transformers() -> Container[Any] | None:
    """None: this version of transformers has no such table, and goes by architectures."""
    try:
        return importlib.import_module(KNOWN).GGUF_PRE_TOKENIZER_SPLITS  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        return None


def _cut(backend: Any, splits: tuple[str, ...]) -> None:
    from tokenizers import Regex, pre_tokenizers  # noqa: PLC0415

    steps = [pre_tokenizers.Split(Regex(each), behavior="isolated") for each in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])


def _ends(header: GGUFHeader, tokenizer: Any) -> list[int]:
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = ENDS & special.keys()
    part, whole = BETWEEN
    if whole <= ends:
        ends -= {part}
    said = (header.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS)
    return sorted({*(special[text] for text in ends), *(int(number) for number in said if number is not None)})
