"""Which way an encoder goes, decided by a comparison at load: the first that gives what the stock forward gives."""

from __future__ import annotations

from math import ceil
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.encoder.batch import EncoderBatch, make_batch
from lmserve.runtime.encoder.lanes import (
    LEAST_FILL,
    EncoderLane,
    PackedEncoderLane,
    PaddedEncoderLane,
    SingleEncoderLane,
    max_positions,
    padded_rows,
    padding_position,
)
from lmserve.runtime.interface import EncoderInput, Task
from lmserve.runtime.load_job import NotExact, trying
from lmserve.runtime.self_check import TOLERANCE

CHECK_LENGTHS = (23, 9, 13, 9, 11)
"""Two of a length, so that a block holds more than one, and two of which one is padded to the other; so is, as far as
ever is padded, one more to the first."""
LONGEST_CHECK = 1024
"""A window or a chunk below it is crossed by the two longest texts."""
WINDOWS = ("sliding_window", "attention_window", "local_attn_chunk_length", "lsh_attn_chunk_length")
"""In a configuration: up to so many tokens a layer attends as if it had no window, or chunk."""
ROUNDINGS = 8
"""Of the largest score, in the model's number format: between scores that are all alike these are what differs."""


def choose_lane(model: PreTrainedModel, dtype: torch.dtype, task: Task, num_tokens: int) -> tuple[EncoderLane, str]:
    """Also why no faster lane would do, in clauses. A step has at most ``num_tokens``.

    Raises:
        ModelLoadFailed: the stock forward itself cannot run, or does not give the same twice.
    """
    if getattr(model.config, "num_buckets", 0) is None:
        raise ModelLoadFailed(f"{type(model).__name__}: the first text that it reads decides how it reads the others")
    inputs = check_inputs(model)
    stock, reasons = _stock(model, inputs, task), list[str]()
    kinds: list[type[EncoderLane]] = [PaddedEncoderLane, SingleEncoderLane]
    if task == "embed":
        kinds.insert(0, PackedEncoderLane)
    for kind in kinds:
        lane: EncoderLane | None = None
        try:
            with trying():
                lane = kind(model)
                _compare(lane, inputs, stock, task, dtype)
                row = _longest_row(model, num_tokens)
                if row is not None and isinstance(lane, PackedEncoderLane):
                    lane.try_row(row)
            return lane, "; ".join(reasons)
        except NotExact as error:
            reasons.append(f"{kind.name}: {error}")
        if isinstance(lane, PackedEncoderLane):
            lane.give_back()
    raise ModelLoadFailed(f"{type(model).__name__} cannot be served exactly: {'; '.join(reasons)}")


def check_inputs(model: PreTrainedModel) -> list[EncoderInput]:
    """Random texts, the first longer than the longest window that can be crossed."""
    text: Any = model.config.get_text_config()
    limit = max_positions(model) or LONGEST_CHECK
    crossing = [window + 8 for window in _windows(text) if window + 8 <= min(LONGEST_CHECK, limit)]
    longest = max(CHECK_LENGTHS[0], *crossing, 0)
    lengths = [min(limit, n) for n in (longest, *CHECK_LENGTHS[1:], ceil(LEAST_FILL * longest))]
    generator = torch.Generator().manual_seed(0)
    # From 3 on: the first few are special tokens, which some models see in their own way. Padding is among the tokens
    # of the texts that are served if it counts for the positions, and a mask wherever there is one: ESM scales a text
    # by how many it has.
    low = min(3, text.vocab_size - 1)
    inputs = [torch.randint(low, text.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    mask = getattr(text, "mask_token_id", None)
    for place, special in ((1, padding_position(model)), (2, mask)):
        if isinstance(special, int) and 0 <= special < text.vocab_size and len(inputs[1]) > place:
            inputs[1][place] = special
    return [EncoderInput(token_ids) for token_ids in inputs]


def _windows(text_config: Any) -> list[int]:
    # Where layers differ, a configuration does not tell one number for all.
    layers = getattr(text_config, "per_layer_config", None) or [text_config]
    found: list[Any] = []
    for config in layers:
        for name in WINDOWS:
            value = getattr(config, name, None)
            found += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in found if isinstance(value, int)]


def _stock(model: PreTrainedModel, inputs: list[EncoderInput], task: Task) -> list[Tensor]:
    """float32 of each text alone: (tokens, hidden) to embed, (labels,) to score."""
    forward: Any = model
    made = []
    try:
        with trying():
            for each in inputs:
                ids = torch.tensor([each.token_ids], device=model.device)
                output = forward(input_ids=ids, attention_mask=torch.ones_like(ids))
                made.append((output.logits if task == "score" else output.last_hidden_state)[0].float())
    except NotExact as error:
        reason = str(error).removeprefix("its code fails there: ")
        raise ModelLoadFailed(f"the model's own forward fails on a short text: {reason}") from error
    return made


def _compare(
    lane: EncoderLane, inputs: list[EncoderInput], stock: list[Tensor], task: Task, dtype: torch.dtype
) -> None:
    """Raises NotExact, with the figures."""
    batch = make_batch(inputs, lane.model.device)
    expected = [stock[index] for index in batch.order]
    compare = _score_error if task == "score" else _vector_error
    error = compare(lane, batch, expected, dtype)
    if not error <= TOLERANCE[dtype]:  # also what is not a number
        what = "scores" if task == "score" else "vectors"
        raise NotExact(
            f"{what} differ from the stock ones by {error:.2g} of their spread, {TOLERANCE[dtype]} is allowed"
        )


def _vector_error(lane: EncoderLane, batch: EncoderBatch, expected: list[Tensor], dtype: torch.dtype) -> float:
    got = torch.split(lane.hidden_states(batch).float(), batch.lengths)
    errors = [(g - e).abs().mean() / e.std() for g, e in zip(got, expected, strict=True)]
    return float(torch.stack(errors).max())


def _score_error(lane: EncoderLane, batch: EncoderBatch, expected: list[Tensor], dtype: torch.dtype) -> float:
    padded = cast(PaddedEncoderLane, lane)
    got = torch.cat([output.logits for output, _ in padded.forwards(batch)]).float()
    scores = torch.stack(expected)
    beyond = (got - scores).abs().max() - ROUNDINGS * torch.finfo(dtype).eps * scores.abs().max()
    return float(beyond.clamp(min=0) / scores.std().clamp(min=torch.finfo(torch.float32).tiny))


def _longest_row(model: PreTrainedModel, num_tokens: int) -> EncoderBatch | None:
    """A step's most tokens, in texts that the model takes; None where these are no more than one text may have."""
    limit = max_positions(model)
    most = max(num_tokens, limit or 0)
    if limit is None or padded_rows(most) <= limit:
        return None
    return make_batch([EncoderInput([0] * limit) for _ in range(-(-most // limit))], model.device)
