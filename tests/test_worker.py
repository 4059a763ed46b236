"""What the worker makes of a configuration."""

from __future__ import annotations

from lmserve.config import ModelConfig
from lmserve.worker import _limits
from tests.engine.fake_runner import make_info


def test_the_scheduler_gets_what_is_configured_and_what_the_runner_can() -> None:
    config = ModelConfig(mixed_step_factor=2.5, prefix_caching=False)
    made = _limits(config, make_info(max_num_seqs=5, max_num_batched_tokens=48, whole_prompts=True))
    assert (made.mixed_step_factor, made.prefix_caching) == (2.5, False)
    assert (made.max_num_seqs, made.max_num_batched_tokens) == (5, 48)
    assert (made.whole_prompts, made.whole_images) == (True, False)
