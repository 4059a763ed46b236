"""A GGUF file made into a model folder: bfloat16 weights, tokenizer, chat template, generation config.

``python -m lmserve.runtime.gguf.folder FILE FOLDER``. Dequantising once makes every later start faster, and other
programs can read the folder too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmserve.config import ModelConfig
from lmserve.gguf_tokenizer import load_gguf_tokenizer
from lmserve.runtime.loader import load_model

PROBE = "Hello  world,\n\n\tit's 12345 o'clock: naïve café, 東京, 😀."


class BadConversion(Exception):
    """What was read from the file does not fit together."""


def convert(source: Path, target: Path) -> None:
    """Write ``target`` (a folder) from ``source`` (a GGUF file).

    Raises:
        BadConversion: the tokenizer does not give texts back, or disagrees with the model.
        ModelLoadFailed: the model cannot be read as the file means it.
        Exception: the readers' own, for a file that is damaged or not known to them.
    """
    tokenizer, end_ids, sampling = load_gguf_tokenizer(source)
    model, _ = load_model(ModelConfig(model=str(source), device="cpu", dtype="bfloat16"))
    check(tokenizer, model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    generation: Any = model.generation_config
    generation.update(eos_token_id=end_ids, bos_token_id=tokenizer.bos_token_id, **sampling)
    tokenizer.save_pretrained(str(target))
    model.save_pretrained(target)


def check(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """A converted tokenizer can be wrong without an error.

    Raises:
        BadConversion: it does not give a text back, or does not fit the model.
    """
    token_ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if tokenizer.decode(token_ids) != PROBE:
        raise BadConversion(f"the tokenizer gives {tokenizer.decode(token_ids)!r} back for {PROBE!r}")
    if len(tokenizer) > model.config.vocab_size:
        raise BadConversion(f"the tokenizer has {len(tokenizer)} tokens, more than the model")
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id != model.config.eos_token_id:
        raise BadConversion(f"tokens end at {tokenizer.eos_token_id}, the model at {model.config.eos_token_id}")


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    source, target = arguments
    try:
        convert(Path(source), Path(target))
    except Exception as error:  # the process's edge: a damaged file fails in the readers in every way there is
        sys.stderr.write(f"lmserve: {source}: {type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
