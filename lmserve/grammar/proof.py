"""The proof, in the API process, that a client's grammar can be enforced: before its request waits in any queue."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lmserve.errors import InvalidRequest
from lmserve.grammar.vocabulary import byte_tokenizer

MAX_GRAMMAR_BYTES = 512 * 1024
COMPILE_SECONDS = 5.0
REMEMBERED = 1024
"""Proofs that are kept: clients send the same grammar again and again."""
THREADS = 2
LIMITS = LLParserLimits(verbose_errors=False)


class GrammarProver:
    """Compiles grammars on threads of its own (llguidance gives up the interpreter's lock) and remembers the outcome.

    A grammar is about bytes, so that it is proved with a vocabulary of bytes, whatever the model's is.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._tokenizer = byte_tokenizer()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def prove(self, grammar: str, path: str) -> None:
        """``path``: of the field that asks for it.

        Raises:
            InvalidRequest: it is too long, cannot be compiled, takes too long, or allows no text.
        """
        check_size(grammar, path)
        key = hashlib.sha256(grammar.encode()).digest()
        if key not in self._known:
            working = asyncio.get_running_loop().run_in_executor(self._threads, problem, self._tokenizer, grammar)
            try:
                self._known[key] = await asyncio.wait_for(asyncio.shield(working), COMPILE_SECONDS)
            except asyncio.TimeoutError:
                raise InvalidRequest(
                    f"{path}: not compiled within {COMPILE_SECONDS:g} seconds, the limit.", path
                ) from None
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        reason = self._known[key]
        if reason is not None:
            raise InvalidRequest(f"{path} cannot be enforced: {reason}", path)

    def close(self) -> None:
        """What is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def check_size(grammar: str, path: str) -> None:
    """Raises ``InvalidRequest`` for a grammar that is too long."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{path}: a grammar of {len(grammar)} bytes, the limit is {MAX_GRAMMAR_BYTES}.", path)


def problem(tokenizer: LLTokenizer, grammar: str) -> str | None:
    """Why a grammar cannot be enforced; None if it can. A text that fits may still be impossible further on."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return _short(matcher.get_error())
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    for token_id in tokenizer.eos_tokens:
        allowed &= ~(1 << token_id)
    if matcher.is_error() or (allowed == 0 and not matcher.is_accepting()):
        return "it allows no text at all"
    return None


def _short(message: str) -> str:
    """llguidance's message without its own state and the grammar, which the client knows."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return [*errors[-1:], *lines, "it cannot be compiled"][0].removeprefix("error: ")[:500]
