"""Tiny encoders with random weights as whole folders, built offline; sentence-transformers reads them too."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from lmserve.config import ModelConfig
from lmserve.runtime.encoder.build import build_encoder
from lmserve.runtime.encoder.recipe import choose_task
from lmserve.runtime.encoder.runner import EmbeddingRunner, ScoreRunner
from lmserve.runtime.interface import EncoderInput

MAX_LENGTH = 96
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
ROBERTA_SPECIAL = ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
"""Padding has the number 1 there, and positions count on from it."""
SIZES: dict[str, Any] = {
    "vocab_size": len(BYTES) + len(SPECIAL),
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
ROBERTA = {**SIZES, "pad_token_id": 1, "max_position_embeddings": MAX_LENGTH + 2}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SIZES),
    "xlm-roberta": transformers.XLMRobertaConfig(**ROBERTA),
    "modernbert": transformers.ModernBertConfig(
        **{**SIZES, "global_attn_every_n_layers": 3}, local_attention=16, cls_token_id=1, sep_token_id=2
    ),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=SIZES["vocab_size"],
        dim=48,
        hidden_dim=96,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.15,
    ),
    "mpnet": transformers.MPNetConfig(**ROBERTA),
    "qwen3": transformers.Qwen3Config(
        **{**SIZES, "max_position_embeddings": 512}, num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=2
    ),
}


def make_tokenizer(special: tuple[str, ...] = SPECIAL, *, begins: bool = True, tells_types: bool = True) -> Any:
    """One token for each byte, with [CLS] before a text (unless it does not ``begin`` so) and [SEP] behind it."""
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate([*special, *BYTES])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    first = "[CLS] " if begins else ""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first}$A [SEP]",
        pair=f"{first}$A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", *(["token_type_ids"] if tells_types else []), "attention_mask"],
    )


def write_encoder(folder: Path, family: str, *, num_labels: int = 0, **more: Any) -> Path:
    """The family's model and tokenizer; with labels, with a head that tells them apart."""
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **more})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tiny configurations, transformers' own
        kind: Any = AutoModel
        if num_labels:
            config.num_labels, kind = num_labels, AutoModelForSequenceClassification
        model = kind.from_config(config)
    model.save_pretrained(folder)
    roberta = family in ("xlm-roberta", "mpnet")
    tokenizer = make_tokenizer(
        ROBERTA_SPECIAL if roberta else SPECIAL, begins=family != "qwen3", tells_types=family == "bert"
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(count: int = 40, longest: int = MAX_LENGTH - 2) -> list[str]:
    """From one byte to the longest, several of a length."""
    draw = random.Random(1)
    lengths = [1, longest, longest, 2, 2, *(draw.randint(1, longest) for _ in range(count - 5))]
    return ["".join(draw.choices("abcdefgh ijkl.", k=length)) for length in lengths]


def load(folder: Path, **config: Any) -> Any:
    """A runner, as the worker makes it."""
    made = ModelConfig(model=str(folder), model_id="m", **config)
    return build_encoder(made, choose_task(made))


def encode_texts(folder: Path, texts: list[str]) -> list[EncoderInput]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [EncoderInput(ids) for ids in tokenizer(texts)["input_ids"]]


def vectors(runner: EmbeddingRunner | ScoreRunner, inputs: list[EncoderInput]) -> NDArray[np.float32]:
    """(inputs, size)."""
    return np.stack([np.frombuffer(row, "<f4") for row in runner.encode(inputs)])
