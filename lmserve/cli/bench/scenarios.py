"""What is asked of a server: how many at once, how long, how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load. Clients wait for an answer before they ask again (a closed loop), unless there is a rate."""

    name: str
    streams: int
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    shared_tokens: int = 0
    """At the beginning of every prompt, the same for all, besides ``prompt_tokens``."""
    long_tokens: int = 0
    """Of one prompt that is read while all others run."""
    rate: float = 0.0
    """Requests in a second, at random times, whether or not others have been answered. 0: a closed loop."""

    @property
    def description(self) -> str:
        how = f"{self.rate:g} requests/s" if self.rate else f"{self.streams} stream{'s' * (self.streams > 1)}"
        prompt = (
            f"{self.shared_tokens} shared + {self.prompt_tokens}" if self.shared_tokens else str(self.prompt_tokens)
        )
        beside = f", beside a prompt of {self.long_tokens}" if self.long_tokens else ""
        return f"{how}, {prompt} → {self.new_tokens} tokens, {self.num_requests} requests{beside}"


_ALL = (
    Scenario(name="s1", streams=1, prompt_tokens=128, new_tokens=128, num_requests=6),
    Scenario(name="s8", streams=8, prompt_tokens=128, new_tokens=128, num_requests=24),
    Scenario(name="s32", streams=32, prompt_tokens=128, new_tokens=128, num_requests=64),
    Scenario(name="prefill", streams=4, prompt_tokens=1024, new_tokens=16, num_requests=12),
    Scenario(name="shared", streams=4, prompt_tokens=32, new_tokens=32, num_requests=16, shared_tokens=1024),
    Scenario(name="mixed", streams=8, prompt_tokens=128, new_tokens=384, num_requests=8, long_tokens=6000),
)
SCENARIOS: Mapping[str, Scenario] = MappingProxyType({scenario.name: scenario for scenario in _ALL})
