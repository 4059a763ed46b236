"""Does lmserve read a type's images exactly: chats with pictures beside ``model.generate``?

The tiny model and a processor of its type go into a folder and the whole road of a load, which compares two pictures.
A type for which that fails is served for texts alone. Else several prompts go through the engine at once, read in
chunks, two of them with the same picture, and with a cache so small that requests are preempted.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.model_types.baseline import TIE, gap, greedy
from benchmarks.model_types.folder import saved
from benchmarks.model_types.processors import write_processor
from benchmarks.model_types.served import BLOCK_SIZE, CONFIG, run
from benchmarks.model_types.tiny import CannotBuild
from lmserve.engine.messages import AddRequest
from lmserve.images.job import ProcessorError
from lmserve.images.placeholders import locate_images
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.build import build_runner
from lmserve.runtime.interface import PromptImage
from lmserve.runtime.loader import reads_images
from lmserve.runtime.vision.check import stock_inputs
from lmserve.sampling_params import SamplingParams

NEW_TOKENS = 6
MAX_LEN = 4096
BUDGET = 48
"""Tokens of a step: prompts are read in chunks."""
NO_ENCODER = "has no get_image_features"
PICTURES = ((64, 48), (40, 72), (33, 33))
"""Width and height."""
PROMPTS: tuple[tuple[str | int, ...], ...] = (
    ("Hello there, how are you",),
    ("What is ", 0, " then"),
    (1, " and ", 2, " are two"),
    ("Is ", 0, " it"),
)
"""Texts, and pictures by number."""


@dataclass(frozen=True, slots=True)
class Pictured:
    """What became of a type's images."""

    images: Literal["exact", "none", "wrong", "fails", "not tried"]
    images_reason: str = ""


@dataclass(frozen=True, slots=True)
class _Case:
    inputs: dict[str, Any]
    """For the stock model."""
    token_ids: list[int]
    images: list[PromptImage]


def picture(model_type: str, model: PreTrainedModel) -> Pictured:
    """The model itself is what ours is compared with."""
    if not reads_images(model.config):
        return Pictured("none", "its class has no image encoder apart from its language model")
    with saved(model) as folder:
        try:
            write_processor(model_type, model, folder)
        except CannotBuild as error:
            return Pictured("not tried", str(error))
        except Exception as error:  # strangers' code, with settings that were guessed
            return Pictured("not tried", f"no processor could be made: {_told(error)}")
        runner = build_runner(replace(CONFIG, model=str(folder), max_model_len=MAX_LEN, max_num_batched_tokens=BUDGET))
        try:
            cases = _make_cases(ImageProcessor.load(str(folder)), model, folder)
            expected = [_generate(model, case) for case in cases]
        except Exception as error:
            if runner.info.images != "none":
                raise
            if not isinstance(error, ProcessorError) and NO_ENCODER not in runner.info.no_images:
                return Pictured("not tried", f"the tiny model itself fails: {_told(error)}")
        if runner.info.images == "none":
            return Pictured("none", " ".join(runner.info.no_images.split()))
        longest = max(len(case.token_ids) for case in cases) + NEW_TOKENS
        for num_blocks in (runner.info.num_blocks, -(-longest // BLOCK_SIZE) + 1):
            runner.info = replace(runner.info, num_blocks=num_blocks)
            try:
                got = run(runner, [_request(i, case) for i, case in enumerate(cases)])
            except Exception as error:
                return Pictured("fails", _told(error))
            for case, tokens, right in zip(cases, got, expected, strict=True):
                problem = _compare(tokens, *right)
                if problem:
                    return Pictured("wrong", f"{len(case.images)} pictures, {num_blocks} blocks: {problem}")
    return Pictured("exact", "the tokens of an image see each other" if runner.info.images == "whole" else "")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _make_cases(processor: ImageProcessor, model: Any, folder: Path) -> list[_Case]:
    draw = np.random.default_rng(1)
    pictures = [Image.fromarray(draw.integers(0, 256, (high, wide, 3), np.uint8)) for wide, high in PICTURES]
    files = []
    for each in map(processor.process, pictures):
        file = folder / uuid.uuid4().hex
        save_file(each.arrays, file)
        files.append((each, str(file)))
    cases = []
    for prompt in PROMPTS:
        shown = [part for part in prompt if isinstance(part, int)]
        text = "".join(processor.image_token if isinstance(part, int) else part for part in prompt)
        if shown:
            inputs = stock_inputs(processor, model, text, [pictures[i] for i in shown])
        else:  # some processors take no text alone
            inputs = {"input_ids": processor.processor.tokenizer([text], return_tensors="pt")["input_ids"]}
        token_ids = inputs["input_ids"][0].tolist()
        counts = [files[i][0].num_placeholders for i in shown]
        places = locate_images(token_ids, processor.placeholder_id, counts)
        images = [
            PromptImage(start, end, files[i][0].content, files[i][1])
            for i, (start, end) in zip(shown, places, strict=True)
        ]
        cases.append(_Case(inputs, token_ids, images))
    return cases


def _request(number: int, case: _Case) -> AddRequest:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return AddRequest(str(number), case.token_ids, sampling, images=case.images)


def _generate(model: Any, case: _Case) -> tuple[list[int], list[Tensor]]:
    """The tokens, and the logits (vocab,) that each was picked from."""
    told = {"output_logits": True, "return_dict_in_generate": True}
    made = model.generate(**case.inputs, generation_config=greedy(NEW_TOKENS), **told)
    return made.sequences[0, len(case.token_ids) :].tolist(), [rows[0] for rows in made.logits]


def _compare(tokens: Sequence[int], right: Sequence[int], logits: Sequence[Tensor]) -> str:
    """What is wrong, if anything. Behind a tie of two logits all may differ."""
    for i, (token, expected, row) in enumerate(zip(tokens, right, logits, strict=True)):
        if token != expected:
            below = gap(row, token)
            return "" if below < TIE else f"token {i + 1} is {below:.2g} spreads below the highest"
    return ""
