"""What the order and the size of prompt chunks do to latency and throughput, on a simulated machine.

    python -m benchmarks.scheduling

The scheduler is the real one; a step takes what a cost model says, on a clock that only the steps move on. So the
figures are the same on every machine, and the policy before (first come first served, whole budget) runs beside.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from lmserve.cli.bench.results import percentile
from lmserve.engine.kv_cache_manager import KVCacheManager
from lmserve.engine.request import Request
from lmserve.engine.scheduler import Scheduler, SchedulerConfig
from lmserve.outputs import RequestOutput
from lmserve.runtime.interface import StepInput, StepOutput
from lmserve.sampling_params import SamplingParams

BUDGET = 512
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step: fixed, for each row that decodes, for each prompt token, and if there are any of these."""

    name: str
    step: float
    row: float
    prompt_token: float
    prompts: float = 0.0

    def seconds(self, step: StepInput) -> float:
        num_rows = sum(chunk.is_decode for chunk in step.chunks)
        num_prompt_tokens = step.num_tokens - num_rows
        extra = self.prompts + self.prompt_token * num_prompt_tokens if num_prompt_tokens else 0.0
        return self.step + self.row * num_rows + extra


SLOW_PROMPTS = Costs("0.6 ms a prompt token", 0.010, 0.000_15, 0.000_6)
FAST_PROMPTS = Costs("0.1 ms a prompt token", 0.010, 0.000_15, 0.000_1)
DEAR_CHUNKS = Costs("0.6 ms a prompt token, 8 ms for any", 0.010, 0.000_15, 0.000_6, 0.008)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests one after another, the next one ``pause`` seconds after the last has ended."""

    name: str
    num_prompt_tokens: int
    num_output_tokens: int
    start: float = 0.0
    pause: float = 0.0
    num_requests: int = 1_000_000


@dataclass(slots=True)
class Served:
    """What one request got, and when."""

    client: str
    num_prompt_tokens: int
    sent: float
    sent_step: int
    first_token_step: int = 0
    """The number of the step that gave the first token; the first that began after it was sent is 1."""
    token_times: list[float] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


class FirstComeFirstServed(Scheduler):
    """The policy before: no prompt makes way for another, and no step is kept short."""

    def _is_long(self, request: Request) -> bool:
        return False


class Simulation:
    """One engine, its clients, and the clock."""

    def __init__(self, costs: Costs, clients: Iterable[Client], *, factor: float = 1.4, before: bool = False) -> None:
        config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=BUDGET, max_model_len=8192)
        kind = FirstComeFirstServed if before else Scheduler
        config = replace(config, mixed_step_factor=math.inf if before else factor)
        self.scheduler = kind(config, KVCacheManager(8_192, BLOCK_SIZE))
        self.costs = costs
        self.now = 0.0
        self.num_steps = 0
        self.served: list[Served] = []
        self.steps: list[tuple[int, int, float]] = []
        """Rows that decoded, prompt tokens, seconds."""
        self._clients = {client.name: client for client in clients}
        self._due = [(client.start, client.name) for client in self._clients.values()]
        heapq.heapify(self._due)
        self._sent: defaultdict[str, int] = defaultdict(int)
        self._live: dict[str, Served] = {}

    def run(self, seconds: float) -> Simulation:
        """Until the clock says so, or all has been served."""
        while self.now < seconds:
            while self._due and self._due[0][0] <= self.now:
                self._send(*heapq.heappop(self._due))
            scheduled = self.scheduler.schedule()
            if scheduled.requests:
                self._compute(scheduled.step)
                count = sum(chunk.samples for chunk in scheduled.step.chunks)
                for output in self.scheduler.update(scheduled, StepOutput([1] * count, [None] * count)):
                    self._note(output)
            elif self._due:
                self.now = self._due[0][0]
            else:
                break
        return self

    def of(self, *clients: str) -> list[Served]:
        """What clients whose names begin so have got."""
        return [one for one in self.served if one.client.startswith(clients) and one.token_times]

    @property
    def tokens_per_second(self) -> float:
        """Prompt and output tokens; of prompts, those that were read to the end."""
        total = sum(one.num_prompt_tokens + len(one.token_times) for one in self.served if one.token_times)
        return total / self.now

    def _send(self, at: float, name: str) -> None:
        client, number = self._clients[name], self._sent[name]
        self._sent[name] += 1
        request_id = f"{name} {number}"
        seed = len(self.served)
        prompt = [(seed * 7_919 + i) % 50_021 for i in range(client.num_prompt_tokens)]
        sampling = SamplingParams(max_tokens=client.num_output_tokens, ignore_eos=True)
        request = Request(
            request_id=request_id, choice=0, prompt_token_ids=prompt, sampling=sampling, arrival=seed,
            cache_root=request_id.encode(),
        )  # fmt: skip
        self.scheduler.add(request)
        self._live[request_id] = Served(name, len(prompt), at, self.num_steps)
        self.served.append(self._live[request_id])

    def _compute(self, step: StepInput) -> None:
        seconds = self.costs.seconds(step)
        num_rows = sum(chunk.is_decode for chunk in step.chunks)
        num_prompt_tokens = step.num_tokens - num_rows
        self.scheduler.pace.costs.observe(num_rows, num_prompt_tokens, seconds)
        self.steps.append((num_rows, num_prompt_tokens, seconds))
        self.num_steps += 1
        self.now += seconds

    def _note(self, output: RequestOutput) -> None:
        one = self._live[output.request_id]
        if output.token_ids:
            one.token_times.append(self.now)
            one.first_token_step = one.first_token_step or self.num_steps - one.sent_step
        if output.finish_reason is not None:
            del self._live[output.request_id]
            client = self._clients[one.client]
            if self._sent[client.name] < client.num_requests:
                heapq.heappush(self._due, (self.now + client.pause, client.name))


def streams(count: int, num_prompt_tokens: int, num_output_tokens: int) -> list[Client]:
    """Clients in a closed loop."""
    return [Client(f"stream {i:02}", num_prompt_tokens, num_output_tokens) for i in range(count)]


def staggered(count: int) -> list[Client]:
    """Clients in a closed loop who do not begin and end at one time."""
    return [Client(f"stream {i:02}", 128, 113 + i * 37 % 31, start=0.21 * i) for i in range(count)]


def mixed_load() -> list[Client]:
    """Eight chats that go on, a long document now and then, and short questions all the time."""
    chats = [Client(f"stream {i:02}", 128, 400 + 20 * i, start=0.1 * i) for i in range(8)]
    return [*chats, Client("long", 6_000, 64, start=5, pause=20), Client("short", 128, 32, start=6, pause=2)]


def one_of_each(start: float) -> list[Client]:
    """A long prompt, and a short one that comes while it is read."""
    return [Client("long", 6_000, 64, num_requests=1), Client("short", 128, 8, start, num_requests=1)]


LOADS: dict[str, list[Client]] = {
    "a long prompt alone, then a short one": one_of_each(start=0.5),
    "8 chats, long documents, short questions": mixed_load(),
    "32 x (128 -> 128)": streams(32, 128, 128),
    "32 x (128 -> 128), each at its own time": staggered(32),
    "8 x (128 -> 128), each at its own time": staggered(8),
    "4 x (1024 -> 16)": streams(4, 1024, 16),
}


def main() -> None:
    print(f"{'':<50}  {'first token of short':<22}{'of long':>9}{'inter-token latency':>26}{'tokens':>10}")
    print(
        f"{'load':<42}{'policy':<8}{'steps':>12}{'ms':>8}{'s':>11}{'median':>12}{'p95':>7}{'p99':>7}{'/s':>10}{'':>7}"
    )
    for costs in (SLOW_PROMPTS, FAST_PROMPTS, DEAR_CHUNKS):
        print(costs.name)
        for name, clients in LOADS.items():
            before = Simulation(costs, clients, before=True).run(120)
            _print(name, "before", before, 1.0)
            now = Simulation(costs, clients).run(120)
            _print("", "now", now, now.tokens_per_second / before.tokens_per_second)


def _print(name: str, policy: str, run: Simulation, ratio: float) -> None:
    short = run.of("short") or run.of("stream")
    long = [one.first_token_seconds for one in run.of("long")]
    gaps = [gap for one in run.served for gap in one.gaps]
    median = statistics.median(gaps)
    print(
        f"{name:<42}{policy:<8}{max(one.first_token_step for one in short):>12}"
        f"{statistics.median(one.first_token_seconds for one in short) * 1e3:>8.0f}"
        f"{f'{statistics.mean(long):.1f}' if long else '':>11}{median * 1e3:>9.1f} ms"
        f"{percentile(gaps, 0.95) / median:>6.2f}x{percentile(gaps, 0.99) / median:>6.2f}x"
        f"{run.tokens_per_second:>9.0f}{ratio:>7.3f}"
    )


if __name__ == "__main__":
    main()
