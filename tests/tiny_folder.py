"""A whole model folder as it comes from the hub, tiny and built offline: weights, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.runtime.tiny_in_turn import build_in_turn
from tests.runtime.tiny_models import FAMILIES, build_tiny

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, the special ones first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, start, end = SPECIAL
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, eos_token=end, additional_special_tokens=[start]
    )
    fast.chat_template = TEMPLATE
    return fast


def write_tiny_folder(folder: Path, family: str = "llama") -> Path:
    """The family's tiny model with a vocabulary of bytes, in ``folder``."""
    tokenizer = byte_tokenizer()
    build = build_tiny if family in FAMILIES else build_in_turn
    model = build(family, vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
