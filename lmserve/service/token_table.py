"""The bytes of each token of a vocabulary, read off the tokenizer's own decoder.

Two families of tokenizers decode token by token, so that the text of a sequence is the concatenation of its tokens'
bytes. *Byte-level BPE* writes each byte as one printable character (the table is that of GPT-2: Radford et al. 2019,
``bytes_to_unicode``). *SentencePiece* (Kudo and Richardson 2018) writes a space as U+2581 and, with byte fallback, a
lone byte as ``<0xNN>``. Any other decoder (WordPiece, say) looks at neighbours: there a token's bytes are what it
decodes to alone, good enough to show and not to concatenate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_WORD_START = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of a vocabulary's tokens."""

    pieces: tuple[bytes, ...]
    """By token id; ids that the vocabulary skips are empty."""
    special_ids: frozenset[int]
    """Control tokens: they have a name in ``pieces`` and are no part of any text."""
    concatenates: bool
    """Whether the text of a sequence is the concatenation of its tokens' bytes."""
    drops_first_space: bool
    """Whether the tokenizer takes the space off the first word of a text."""
    has_bytes: bool = False
    """Whether any text can be written, because each byte has a token."""

    def piece(self, token_id: int) -> bytes:
        """A token's bytes; empty for the padding ids that a model's vocabulary may have beyond its tokenizer's."""
        return self.pieces[token_id] if token_id < len(self.pieces) else b""


def build_token_table(tokenizer: Any) -> TokenTable:
    """The table of a transformers tokenizer. Takes some tenths of a second for a large vocabulary."""
    added = tokenizer.added_tokens_decoder
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    decoder = _decoder_state(tokenizer)
    steps = [decoder, *decoder.get("decoders", ())]
    kinds = {step.get("type") for step in steps} - {"Sequence", "Fuse"}
    to_bytes: Callable[[str], bytes]
    if kinds == {"ByteLevel"}:
        to_bytes = _byte_level(_byte_of_character())
    elif kinds and all(_is_sentencepiece(step) for step in steps):
        to_bytes = _sentencepiece_with_bytes if "ByteFallback" in kinds else _sentencepiece
    else:
        return TokenTable(_decoded_alone(tokenizer, names), _special(added), False, False)
    pieces = [b""] * (max(names, default=-1) + 1)
    for token_id, name in names.items():
        pieces[token_id] = name.encode() if token_id in added and kinds == {"ByteLevel"} else to_bytes(name)
    drops = any(step.get("type") == "Strip" or step.get("prepend_scheme") in ("always", "first") for step in steps)
    has_bytes = kinds == {"ByteLevel"} or "ByteFallback" in kinds
    return TokenTable(tuple(pieces), _special(added), True, drops, has_bytes)


def _special(added: Mapping[int, Any]) -> frozenset[int]:
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _decoder_state(tokenizer: Any) -> dict[str, Any]:
    """The Rust decoder's own description; empty for tokenizers written in Python."""
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return state


def _is_sentencepiece(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "Sequence" | "Fuse" | "ByteFallback"}:
            return True
        case {"type": "Metaspace", "replacement": replacement}:
            return bool(replacement == _WORD_START)
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
            return bool(pattern == _WORD_START and content == " ")
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return bool(content == " " and start == 1 and stop == 0)
    return False


def _byte_of_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = sorted(set(range(256)) - set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return table


def _byte_level(byte_of: Mapping[str, int]) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        try:
            return bytes([byte_of[character] for character in token])
        except KeyError:  # a token that was never byte-encoded stands for itself
            return token.encode()

    return to_bytes


def _sentencepiece(token: str) -> bytes:
    return token.replace(_WORD_START, " ").encode()


def _sentencepiece_with_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _sentencepiece(token)


def _decoded_alone(tokenizer: Any, names: Mapping[int, str]) -> tuple[bytes, ...]:
    pieces = [b""] * (max(names, default=-1) + 1)
    for token_id in names:
        pieces[token_id] = tokenizer.decode([token_id], clean_up_tokenization_spaces=False).encode()
    return tuple(pieces)
