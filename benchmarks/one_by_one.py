"""``model.generate``, one prompt after the other: the script that people have before they have a server.

Reads a job as JSON from standard input (model, device, dtype, threads, prompts, new_tokens) and writes the timings as
one JSON line. The first prompt is run once before the clock starts.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class FirstTokenClock:
    """A streamer, as ``generate`` calls them, that notes when the first new token comes."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self._had_prompt = False

    def put(self, _: torch.Tensor) -> None:
        if self._had_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        self._had_prompt = True

    def end(self) -> None:
        """Nothing to flush."""


def run(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """One greedy answer of exactly ``new_tokens`` tokens, as the fields of a ``RequestTiming``."""
    clock = FirstTokenClock()
    sent = time.perf_counter()
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **length)
    last = time.perf_counter()
    num_prompt = ids.shape[1]
    return {
        "sent": sent,
        "first_token": clock.first_token or last,
        "last_token": last,
        "prompt_tokens": num_prompt,
        "completion_tokens": output.shape[1] - num_prompt,
    }


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """The job's tokenizer and model."""
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(job["device"])
    # Greedy: generate warns of sampling parameters that it will not use.
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return AutoTokenizer.from_pretrained(job["model"]), model


def main() -> None:
    job = json.load(sys.stdin)
    tokenizer, model = load(job)
    prompts = []
    for prompt in job["prompts"]:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append(torch.tensor([ids], device=job["device"]))
    run(model, prompts[0], job["new_tokens"])
    print(json.dumps([run(model, ids, job["new_tokens"]) for ids in prompts]))


if __name__ == "__main__":
    main()
