"""Token ids in, text out, as the tokens come: never half a character.

Where tokens are bytes (``TokenTable.concatenates``) this is an incremental UTF-8 decoder. The result is the
tokenizer's own decoding of the whole sequence, except that (a) bytes of a character that is never completed are
dropped at the end, and (b) with SentencePiece's byte fallback one stray byte does not turn the good characters beside
it into U+FFFD. (The incremental decoder of ``tokenizers`` stops with "Invalid prefix encountered" there.)

Other tokenizers decode a short window twice and send the difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from lmserve.service.token_table import TokenTable

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8
"""A character has at most four bytes: what is not one after so many tokens never will be."""


class IncrementalDetokenizer(Protocol):
    """The text of one choice, piece by piece. Control tokens have none."""

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        ...

    def finish(self) -> str:
        """What is left. An incomplete character is dropped: nobody meant it."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes.

    ``drop_first_space``: the text begins here, and the tokenizer writes no space before a text's first word.
    """

    def __init__(self, table: TokenTable, *, drop_first_space: bool = False) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._drop_first_space = drop_first_space

    def push(self, token_id: int) -> str:
        if token_id in self._table.special_ids:
            return ""
        text = self._decode(self._table.piece(token_id))
        if self._drop_first_space and text:
            self._drop_first_space = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return ""


class PrefixDetokenizer:
    """For any tokenizer: decodes the last tokens with and without the new ones, and sends the difference."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._token_ids: list[int] = []
        self._prefix_start = 0
        self._sent_end = 0

    def push(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        text = self._unsent()
        held = len(self._token_ids) - self._sent_end
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        self._prefix_start, self._sent_end = self._sent_end, len(self._token_ids)
        return text

    def finish(self) -> str:
        return self._unsent().rstrip(_REPLACEMENT)

    def _unsent(self) -> str:
        prefix = self._decode(self._token_ids[self._prefix_start : self._sent_end])
        return self._decode(self._token_ids[self._prefix_start :])[len(prefix) :]
