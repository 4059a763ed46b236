"""Whole conversions: tests/models/test_starter.py."""

from __future__ import annotations

import pytest

from lmserve.runtime.gguf.folder import BadConversion, check
from tests.runtime.tiny_models import build_tiny
from tests.tiny_folder import byte_tokenizer


def test_what_fits_together_passes() -> None:
    tokenizer = byte_tokenizer()
    model = build_tiny("llama", vocab_size=len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    check(tokenizer, model)


def test_a_tokenizer_that_loses_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = None
    model = build_tiny("llama", vocab_size=len(tokenizer))
    with pytest.raises(BadConversion, match="back for"):
        check(tokenizer, model)


def test_a_model_with_fewer_tokens() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(BadConversion, match="more than the model"):
        check(tokenizer, build_tiny("llama", vocab_size=len(tokenizer) - 1))


def test_another_end() -> None:
    tokenizer = byte_tokenizer()
    model = build_tiny("llama", vocab_size=len(tokenizer))
    model.config.eos_token_id = 7
    with pytest.raises(BadConversion, match="the model at 7"):
        check(tokenizer, model)
