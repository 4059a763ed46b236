"""The sections by name, and the order and the time in which a whole run does them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.results import Row
from benchmarks.gpu.setting import Setting

MODULES = {
    "limits": "limits",
    "kernels": "kernels",
    "attention": "attention_speed",
    "serving": "serving",
    "peers": "peers",
    "steps": "steps",
    "start": "start",
}
OF_A_MODEL = ("serving", "peers", "steps", "start")
"""The others are about the device."""
LIMITS = "limits"


@dataclass(frozen=True, slots=True)
class Job:
    """One section, of one model if it is about one."""

    section: str
    model: str
    most_seconds: float
    """It is stopped after that, so that it does not cost the others their time."""


# What is wanted most comes first: when the time is used up, the rest is left out.
JOBS = (
    Job(LIMITS, "", 45),
    Job("kernels", "", 90),
    Job("serving", "qwen3-8b", 120),
    Job("serving", "qwen3-0.6b", 90),
    Job("peers", "qwen3-8b", 90),
    Job("steps", "qwen3-8b", 90),
    Job("start", "qwen3-0.6b", 120),
    Job("attention", "", 60),
    Job("steps", "qwen3-0.6b", 90),
    Job("serving", "llama-3.1-8b", 90),
    Job("serving", "qwen3-30b-a3b", 120),
    Job("steps", "qwen3-30b-a3b", 90),
    Job("serving", "qwen3-1.7b", 90),
    Job("steps", "llama-3.1-8b", 90),
    Job("steps", "qwen3-1.7b", 90),
    Job("peers", "qwen3-0.6b", 90),
)


def chosen(sections: list[str], models: list[str]) -> list[Job]:
    """The jobs of a run; an empty list means all. Asked for by name, a model has each section that it can have, in
    the order above, and its own time. What the device can do is always measured: without it there are no shares."""
    jobs = [job for job in JOBS if not sections or job.section in sections or job.section == LIMITS]
    if not models:
        return jobs
    about_models = {job.section: job.most_seconds for job in jobs if job.model}
    if sections:
        about_models |= {name: 90.0 for name in OF_A_MODEL if name in sections and name not in about_models}
    return [job for job in jobs if not job.model] + [
        Job(section, model, most) for section, most in about_models.items() for model in models
    ]


def runner_of(section: str) -> Callable[[Setting], Iterator[Row]]:
    """A section's ``run``. Raises KeyError: there is no such section."""
    run: Callable[[Setting], Iterator[Row]] = import_module(f"benchmarks.gpu.{MODULES[section]}").run
    return run
