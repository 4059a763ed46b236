"""A model from a GGUF file: by transformers where it can read the architecture's weights, else by ourselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lmserve.runtime.gguf.file import GGUFFile
from lmserve.runtime.gguf.tensors import quick_names, read_weights, reads_here


def load_gguf(
    path: Path, model_config: Any, auto_class: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report of what is missing. ``options``: what ``from_pretrained`` is called with,
    ``output_loading_info`` among it.

    Raises:
        Exception: transformers' own.
    """
    file = GGUFFile(path)
    if reads_here(file):
        with torch.device("meta"):
            hollow: PreTrainedModel = auto_class.from_config(model_config)
        weights = read_weights(file, hollow, options["dtype"])
        own = {name: value for name, value in options.items() if name not in ("gguf_file", "quantization_config")}
        make: Any = type(hollow)
        model, report = make.from_pretrained(None, config=model_config, state_dict=weights, **own)
    else:
        with quick_names():
            model, report = auto_class.from_pretrained(str(path.parent), config=model_config, **options)
    return model, report
