"""The worker's half: which tokens each constrained sequence may have next.

A matcher's state is a function of its grammar and the tokens so far, so that a sequence which lost its slot (by a
preemption, a pause, a step that failed) gets a new matcher, which is told its output once more, at a microsecond a
token.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.grammar.vocabulary import read_tokenizer

COMPILED = 64
"""Grammars that are kept compiled."""
THREADS = 2
"""One compiles while the other makes masks. Both give up the interpreter's lock."""
LIMITS = LLParserLimits(verbose_errors=False)

logger = logging.getLogger(__name__)


class GrammarError(Exception):
    """A sequence's grammar cannot be enforced: a limit of llguidance, or a bug of ours."""


class GrammarMasks:
    """Owns the matchers of the slots, and the threads on which grammars are compiled and masks made.

    ``use_vocabulary`` and ``prepare`` return at once. Between ``start`` and ``wait`` the matchers are a thread's, and
    nothing else may be called.
    """

    def __init__(self, *, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._matchers: list[LLMatcher | None] = [None] * max_num_seqs
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._filling: Future[NDArray[np.int32]] | None = None

    def use_vocabulary(self, text: TokenizerText) -> None:
        """Has to come before the first grammar."""
        self._tokenizer = self._threads.submit(read_tokenizer, text, self._vocab_size)

    def prepare(self, grammar: str) -> None:
        """Compiles a grammar that will soon be wanted."""
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            return
        self._compiled[grammar] = self._threads.submit(self._compile, grammar)
        if len(self._compiled) > COMPILED:
            self._compiled.popitem(last=False)

    def begin(self, slot: int, grammar: str, output_token_ids: Sequence[int]) -> None:
        """Gives a slot's new owner its matcher. ``grammar``: empty for none.

        Raises:
            GrammarError: it cannot be compiled, or does not allow the output.
        """
        self._matchers[slot] = None
        if not grammar:
            return
        self.prepare(grammar)
        matcher = self._compiled[grammar].result().deep_copy()
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        if output_token_ids and not matcher.consume_tokens(list(output_token_ids)):
            raise GrammarError(f"the grammar does not allow the output so far: {matcher.get_error()}")
        self._matchers[slot] = matcher

    def start(self, slots: Sequence[int]) -> bool:
        """Begins to make the masks of a step whose rows are these slots'. Whether any of them has a grammar."""
        assert self._filling is None, "wait comes first"
        if not any(self._matchers[slot] is not None for slot in slots):
            return False
        self._filling = self._threads.submit(self._fill, list(slots))
        return True

    def wait(self) -> NDArray[np.int32] | None:
        """(rows, ceil(vocab / 32)): bit i % 32 of word i // 32 allows token i. None if no row has a grammar.

        A row whose matcher has failed allows nothing.
        """
        filling, self._filling = self._filling, None
        return None if filling is None else filling.result()

    def accept(self, slot: int, token_id: int) -> None:
        """The slot's owner has got a token. One that its grammar does not allow shows in its next mask."""
        matcher = self._matchers[slot]
        if matcher is not None and token_id >= 0 and not matcher.consume_token(token_id):
            logger.error("A grammar does not allow token %d: %s", token_id, matcher.get_error())

    def _compile(self, grammar: str) -> LLMatcher:
        assert self._tokenizer is not None, "use_vocabulary comes first"
        return LLMatcher(self._tokenizer.result(), grammar, log_level=0, limits=LIMITS)

    def _fill(self, slots: Sequence[int]) -> NDArray[np.int32]:
        tokenizer = self._tokenizer
        assert tokenizer is not None, "use_vocabulary came before the first grammar"
        num_words = -(-tokenizer.result().vocab_size // 32)
        masks = np.full((len(slots), num_words), -1, dtype=np.int32)
        for row, slot in enumerate(slots):
            matcher = self._matchers[slot]
            if matcher is None:
                continue
            fill_next_token_bitmask(matcher, masks, row)
            if matcher.is_error():  # where llguidance has failed it allows the end, and the output would look complete
                logger.error("A grammar's mask cannot be made: %s", matcher.get_error())
                masks[row] = 0
        return masks[:, : self._num_words]
