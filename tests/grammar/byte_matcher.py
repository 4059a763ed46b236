"""llguidance over a vocabulary of the 256 bytes and an end: every text has one spelling, so that what is asked of a
matcher here is asked of the grammar alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from lmserve.grammar.schema import JSON_OPTIONS

END = 256


class _Bytes:
    """What llguidance asks of a tokenizer in Python."""

    eos_token_id = END
    bos_token_id = None
    tokens: Sequence[bytes] = [*(bytes([i]) for i in range(256)), b"<end>"]
    special_token_ids: Sequence[int] = [END]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=END)


class CannotCompile(Exception):
    """llguidance refuses the schema."""


def compiled(cleaned: dict[str, Any]) -> LLMatcher:
    """A matcher of an enforceable schema, at its beginning."""
    grammar = LLMatcher.grammar_from_json_schema(cleaned, overrides=JSON_OPTIONS)
    matcher = LLMatcher(TOKENIZER, grammar, limits=LLParserLimits(verbose_errors=False))
    matcher.compute_bitmask()
    if matcher.is_error():
        raise CannotCompile(matcher.get_error())
    return matcher


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Whether the text is an output of the grammar, from its first byte to its last."""
    copy = matcher.deep_copy()
    ids = list(text.encode())
    return copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()


def random_output(matcher: LLMatcher, rng: random.Random, max_bytes: int = 400) -> bytes | None:
    """One complete output, byte by byte among those allowed; None where it had no end within the limit.

    A third of the choices are the bytes that end things or begin what is told apart badly (escapes, nines, exponents).
    """
    copy = matcher.deep_copy()
    output = bytearray()
    while len(output) <= max_bytes:
        mask = int.from_bytes(copy.compute_bitmask(), "little")
        allowed = [i for i in range(257) if mask >> i & 1]
        assert not copy.is_error(), copy.get_error()
        assert allowed
        likely = [i for i in allowed if i == END or i in b'"]}\\n09e.-']
        is_late = len(output) > max_bytes // 4
        token = rng.choice(likely if likely and rng.random() < (0.7 if is_late else 0.35) else allowed)
        if token == END:
            return bytes(output)
        assert copy.consume_token(token)
        output.append(token)
    return None
