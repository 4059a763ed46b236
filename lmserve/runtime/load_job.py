"""What the building of a lane begins with, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.runtime.attention.base import AttentionBackend
from lmserve.runtime.lane import Lane
from lmserve.runtime.loader import native_context_length
from lmserve.runtime.memory import CacheSize, size_cache, usable_bytes
from lmserve.runtime.packed_lane import UnsupportedModel
from lmserve.runtime.quantization import Quantization
from lmserve.runtime.self_check import PACKED, CheckResult, check_lane
from lmserve.runtime.vision.check import ImageCheck

Progress = Callable[[str, float], None]


class NotExact(Exception):
    """A lane does not give the model's own logits, or cannot run it; the message says so in a clause."""


@contextmanager
def trying() -> Iterator[None]:
    """Around a model's own code, which may not know what to do with what a lane gives it.

    Raises:
        NotExact: it raised something, but for running out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UnsupportedModel as error:
        raise NotExact(str(error)) from error
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise NotExact(f"its code fails there: {' '.join(str(error).split())[:200]}") from error


@dataclass(slots=True)
class LoadJob:
    """A model that is on its device, and what is wanted of it."""

    model: PreTrainedModel
    config: ModelConfig
    dtype: torch.dtype
    progress: Progress
    reserved_bytes: int
    """Of the free memory, kept for others."""
    are_weights_ready: bool = False
    """Whether they have been merged, quantized and packed: a second lane finds them so."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def on_cpu(self) -> bool:
        return self.model.device.type == "cpu"

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def kind(self) -> Quantization | None:
        return None if self.config.quantization == "none" else self.config.quantization  # type: ignore[return-value]

    def tell(self, sentence: str) -> None:
        """For the start-up message."""
        if sentence:
            self.progress(sentence, 0.88)

    @property
    def free_bytes(self) -> int:
        """What the model may still take, its activations included."""
        config = self.config
        graphs, others = config.cuda_graphs, self.reserved_bytes
        return usable_bytes(self.device, config.gpu_memory_utilization, graphs=graphs, others=others)

    def size_cache(self, bytes_per_block: int, free: int, max_num_seqs: int) -> CacheSize:
        """See ``memory.size_cache``."""
        return size_cache(
            block_bytes=bytes_per_block,
            block_size=self.config.block_size,
            budget=self.config.kv_cache_memory,
            asked_len=self.config.max_model_len,
            native_len=native_context_length(self.model),
            max_num_seqs=max_num_seqs,
            free=free,
            device_type=self.device.type,
        )

    def compare(self, lane: Lane, manner: str) -> CheckResult | None:
        """With the stock forward; None if that is not wanted, or the cache too small to compare anything in."""
        block_size = self.config.block_size
        needed = 3 * -(-64 // block_size) * block_size
        if not self.config.self_check or lane.num_slots < needed:
            return None
        self.progress("comparing with the stock forward", 0.9)
        most = lane.num_slots // 3 - block_size if manner != PACKED else lane.num_slots // 4
        with trying():
            return check_lane(lane, self.vocab_size, block_size, most, self.dtype, manner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A lane with its memory that is exact, as far as that was asked."""

    lane: Lane
    size: CacheSize
    kv_cache_bytes: int
    """States of recurrent layers included."""
    max_num_seqs: int
    attention_backend: str
    backend: AttentionBackend | None
    """None where the model attends by itself."""
    context_cost: float = 0.0
    images: ImageCheck
    num_saved_states: int | None = None
    whole_prompts: bool = False
    lane_reason: str = ""
    """See ``RunnerInfo``, as of the two before."""


def off_by(result: CheckResult) -> str:
    """What is wrong with a lane."""
    return f"logits differ from the stock ones by {result.error:.2g} of their spread, {result.tolerance:.2g} is allowed"
