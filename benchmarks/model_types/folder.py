"""A tiny model in a folder, as a load finds one."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def saved(model: PreTrainedModel) -> Iterator[Path]:
    """The folder, for as long as the block lasts; in it nothing is drawn, warned of or kept for gradients."""
    progress: Any = transformers_logging
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress.disable_progress_bar()
        model.save_pretrained(folder)
        yield Path(folder)
