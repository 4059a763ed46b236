"""Does lmserve give a model's vectors exactly: many texts at once, beside its own forward of each text alone?

The tiny model goes the whole road of a load: into a folder, through the plan of its memory, through the load with its
comparison, and into the engine, which shares steps among two requests.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.model_types.folder import saved
from benchmarks.model_types.served import Served
from benchmarks.model_types.sizes import SPECIAL_TOKENS, VOCABULARY
from lmserve.config import ModelConfig
from lmserve.engine.encoder_core import EncoderCore
from lmserve.engine.messages import Encode
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.encoder.build import build_encoder
from lmserve.runtime.encoder.plan import plan_encoder
from lmserve.runtime.encoder.runner import EmbeddingRunner
from lmserve.runtime.interface import EncoderInput

LENGTHS = (23, 19, 1, 9, 70, 9, 14, 31, 60)
"""The windows and chunks of the tiny models are crossed. One more text is as long as the model takes."""
LONGEST = 512
"""Of that one, where the model takes more."""
TOLERANCE = 1e-5
"""No number of a vector may differ by more, or than so much of the vector's largest, where that is above 1."""


def embed(model: PreTrainedModel) -> Served:
    """What the server makes of the model, pooled by the mean. The model itself is not run."""
    with saved(model) as folder:
        config = ModelConfig(model=str(folder), model_id="tiny", device="cpu", dtype="float32", task="embed")
        try:
            plan_encoder(config, "embed")
            runner = build_encoder(config, "embed")
        except ModelLoadFailed as error:
            return Served("refused", "", str(error).replace(str(folder), "its folder"))
        assert isinstance(runner, EmbeddingRunner)
        lane = runner.info.lane
        texts, expected, failed = _references(model, make_texts(model, runner.info.max_model_len))
        try:
            got = run(runner, texts)
        except Exception as error:
            return Served("fails", lane, f"{type(error).__name__}: {error}")
    for text, vector, right in zip(texts, got, expected, strict=True):
        error_ = float(np.abs(vector - right).max() / max(1.0, float(np.abs(right).max())))
        if not error_ <= TOLERANCE:  # also what is not a number
            return Served("wrong", lane, f"text of {len(text)} tokens: {error_:.1g} off, {TOLERANCE} is allowed")
    return Served("exact", lane, "; ".join([*failed, runner.info.lane_reason]).strip("; "))


def make_texts(model: PreTrainedModel, limit: int) -> list[list[int]]:
    """Random tokens, and in one text those for padding and masks, if the model has such."""
    draw = torch.Generator().manual_seed(3)
    lengths = [*(n for n in LENGTHS if n <= limit), min(limit, LONGEST)]
    texts = [torch.randint(SPECIAL_TOKENS, VOCABULARY - 4, (n,), generator=draw).tolist() for n in lengths]
    config = model.config.get_text_config()
    for place, name in ((1, "pad_token_id"), (2, "mask_token_id")):
        token = getattr(config, name, None)
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            texts[0][place] = token
    return texts


def run(runner: EmbeddingRunner, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    """The engine's vectors, the texts dealt out to two requests. Raises RuntimeError with what it says of a failure."""
    engine = EncoderCore(runner)
    news = []
    for request in (0, 1):
        news += engine.handle(Encode(str(request), [EncoderInput(text) for text in texts[request::2]]))
    while engine.has_work:
        news += engine.step()
    got: dict[int, NDArray[np.float32]] = {}
    for output in news:
        if output.error:
            raise RuntimeError(output.error)
        rows = np.frombuffer(output.rows, "<f4").reshape(len(output.indices), -1)
        got |= {2 * i + int(output.request_id): row for i, row in zip(output.indices, rows, strict=True)}
    return [got[i] for i in range(len(texts))]


def _references(
    model: PreTrainedModel, texts: Sequence[list[int]]
) -> tuple[list[list[int]], list[NDArray[np.float32]], list[str]]:
    """The texts that the model's own forward takes, their vectors, and clauses on the others."""
    taken, vectors, failed = [], [], []
    for text in texts:
        ids = torch.tensor([text])
        # A copy for each, for some remember what they have read (BigBird).
        forward: Any = copy.deepcopy(model)
        try:
            states: Tensor = forward(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
        except Exception:
            failed.append(f"its own forward fails on a text of {len(text)} token{'s' * (len(text) > 1)}")
            continue
        taken.append(text)
        vectors.append(states.float().mean(0).numpy())
    return taken, vectors, failed
