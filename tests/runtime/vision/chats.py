"""Chats with pictures, as the engine gets them and as stock transformers does."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest, Pause, Resume
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.images.placeholders import locate_images
from lmserve.images.processor import ImageProcessor
from lmserve.runtime.build import build_runner
from lmserve.runtime.interface import PromptImage
from lmserve.sampling_params import SamplingParams
from tests.images.tiny_vlms import (
    assistant,
    load_model,
    load_processor,
    model_inputs,
    pictures,
    reference_answer,
    user,
    write_tiny_vlm,
)

NUM_NEW = 8
MAX_LEN = 640
BLOCK_SIZE = 4
MAX_SEQS = 12

ALL_SEE = ("gemma3", "gemma4-large")
"""Families in which the tokens of an image see each other."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """A chat and the tokens that stock transformers answers it with."""

    token_ids: list[int]
    images: list[PromptImage]
    answer: tuple[int, ...]


class Family:
    """One family's tiny model: stock, and what ours is built from."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = write_tiny_vlm(folder / "model", family)
        self.files = folder
        self.model: PreTrainedModel = load_model(self.folder)
        self.processor: Any = load_processor(self.folder)
        self.ours = ImageProcessor.load(str(self.folder))

    def case(self, messages: Messages) -> Case:
        """With the files of the pictures' features written."""
        token_ids = model_inputs(self.processor, messages)["input_ids"][0].tolist()
        shown = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        found = [self.ours.process(picture.convert("RGB")) for picture in shown]
        places = locate_images(token_ids, self.ours.placeholder_id, [each.num_placeholders for each in found])
        images = []
        for features, (start, end) in zip(found, places, strict=True):
            file = self.files / uuid.uuid4().hex
            save_file(features.arrays, file)
            images.append(PromptImage(start, end, features.content, str(file)))
        return Case(token_ids, images, tuple(reference_answer(self.model, self.processor, messages, NUM_NEW)))

    def engine(self, *, max_batched_tokens: int = 512, kv_tokens: int = 8192, **overrides: Any) -> EngineCore:
        """Ours, behind the real runner."""
        config = ModelConfig(
            model=str(self.folder),
            dtype=overrides.pop("dtype", "float32"),
            kv_cache_memory=kv_tokens * self._token_bytes(),
            max_model_len=min(MAX_LEN, kv_tokens),
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=max_batched_tokens,
            **overrides,
        )
        runner = build_runner(config)
        return EngineCore(
            runner,
            SchedulerConfig(
                max_num_seqs=MAX_SEQS,
                max_num_batched_tokens=max_batched_tokens,
                max_model_len=config.max_model_len,
                whole_images=runner.info.images == "whole",
                prefix_caching=config.prefix_caching,
            ),
        )

    def _token_bytes(self) -> int:
        config: Any = self.model.config
        text = config.get_text_config()
        said = text.to_dict()
        size = said.get("head_dim") or text.hidden_size // text.num_attention_heads
        by_layer = {int(i): layer for i, layer in (said.get("per_layer_config") or {}).items()}
        sizes = [by_layer.get(i, {}).get("head_dim", size) for i in range(text.num_hidden_layers)]
        return int(2 * text.num_key_value_heads * 4 * sum(sizes))


def chats() -> dict[str, list[dict[str, Any]]]:
    """Without, with one, with several pictures, and in several turns."""
    some = {name: picture.convert("RGB") for name, picture in pictures().items()}
    return {
        "text": [user("Hello there, how are you?")],
        "one": [user("What is it?", some["stripes"], "Say.")],
        "three": [user(some["red"], "first", some["disc"], some["grey"], "all of them?")],
        "turns": [
            user(some["disc"], "one"),
            assistant("Indeed."),
            user("two", some["stripes"]),
            assistant("So."),
            user("?"),
        ],
    }


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_NEW, temperature=0.0, **options)


def run(engine: EngineCore, cases: Sequence[Case], *, pauses: bool = False, n: int = 1) -> list[tuple[int, ...]]:
    """Everything at once; the tokens of each request's last choice."""
    results: defaultdict[str, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        add = AddRequest(str(i), case.token_ids, greedy(n=n), eos_token_ids=[2], images=case.images)
        assert engine.add_request(add) == []
    num_steps = 0
    while engine.has_work:
        paused = str(num_steps % len(cases))
        if pauses:
            engine.pause(Pause(paused))
        for output in engine.step():
            assert output.error is None
            if output.choice == n - 1:
                results[output.request_id] += output.token_ids
        engine.resume(Resume(paused))
        num_steps += 1
    engine.check_integrity()
    return [tuple(results[str(i)]) for i in range(len(cases))]
