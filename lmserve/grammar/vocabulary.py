"""Vocabularies that grammars are compiled for."""

from __future__ import annotations

import msgspec
from llguidance import LLTokenizer

from lmserve.grammar.tokenizer_text import TokenizerText


def read_tokenizer(text: TokenizerText, vocab_size: int) -> LLTokenizer:
    """Takes some tenths of a second, and the interpreter's lock. ``vocab_size``: of the logits.

    Raises:
        ValueError: llguidance cannot read this kind of tokenizer.
    """
    # A tokenizer may have more tokens than the model has logits for: these are never sampled.
    return LLTokenizer(text.json, n_vocab=max(vocab_size, text.num_ids), eos_token=text.eos_token_ids)


def byte_tokenizer() -> LLTokenizer:
    """One token a byte, and one for the end: enough to prove a grammar, which is about bytes."""
    end = {"id": 256, "content": "<end>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    state = {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
    }
    return LLTokenizer(msgspec.json.encode(state).decode(), eos_token=[256])
