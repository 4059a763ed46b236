"""How many prompt tokens a step may read that others decode in.

All that decode wait for the step's end, so its length is their inter-token latency. Sarathi-Serve (arXiv:2403.02310)
bounds it by one budget of tokens for all steps, found by profiling. Here the budget of such mixed steps comes from
what the steps themselves have taken: a decode step of ``n`` rows ``a + c n`` seconds, ``p`` prompt tokens ``d + b p``
more, where a token with a context counts for more than one (``context_cost``). A mixed step may take ``factor`` times
as long as a decode step would, so that streams stay even while a prompt is read, which with a factor of 1.5 has a third
of the machine then. But no chunk is so small that ``d`` is more than half of what it adds: streams would be slow for
nothing.

That alone would keep more and more prompts waiting under a load that needs a larger part for its prompts, and leave
fewer and fewer to decode, though a decode step costs nearly as much with few rows as with many. So the allowance grows
with the *pressure*: how many prompts there are beyond the first, and beyond a second one where many decode, for each
row that decodes, on the average of the last steps. Then prompts are spread evenly over the steps, at about the rate at
which they come: what is a long step is one among others. Where those who wait are nearly as many as those who decode, a
*crowd* as after a burst, that is not waited for: the whole budget serves more of them sooner, and small chunks beside a
row or two would read all weights for little.

A step in which nobody decodes has the whole budget. Where steps that only decode have not been seen yet, a few are
made of the next ones: under a load that always reads nothing would ever be known. Where that does not help, either, a
mixed step has a fixed part.

What was measured decides where chunks end, and nothing else. In short number formats that changes rounding, as does any
other company that a request has. A request of one choice that is alone is cut by the budget only, and so always alike.
"""

from __future__ import annotations

import math

from lmserve.runtime.interface import StepInput

GRAIN = 8
"""Allowances are multiples of it, and at least one of it: few sizes, and a prompt always gets on."""
MIN_DECODE_STEPS = 4
"""Seen before anything is judged by them: the first steps of a worker are slow."""
OUTLIER = 3.0
"""So many times what was expected is as much as one step may teach."""
MEMORY = 32
"""Steps that an average goes back."""
LEAST_SECONDS = 1e-9
"""Below this nothing is believed."""
UNKNOWN_SHARE = 8
"""A mixed step has this part of the budget while the costs are unknown."""
PRESSURE_GAIN = 64.0
"""One prompt too many for each so many that decode doubles the allowance."""
MOST_PRESSURE = 0.25
"""What one step may count as: a burst that meets few who decode should not be felt long after it has gone."""
PRESSURE_MEMORY = 128
"""Steps that the pressure goes back. Much shorter, and steps would be long and short by turns."""
CROWD = 2
"""Rows that decode for each prompt beyond the first; with fewer, nearly as many wait as decode."""
MANY_ROWS = 8
"""Beside so many that decode, or more, two prompts are not too many: a long one, and a short one that goes by."""


class Line:
    """Seconds by a count: a straight line through recent points, which neither falls nor begins below 0."""

    def __init__(self, *, flat: bool) -> None:
        self.num_points = 0
        self._flat = flat
        """What it is while all points have one count: flat, or through the origin."""
        self._count = self._seconds = self._variance = self._covariance = 0.0

    @property
    def slope(self) -> float:
        steepest = self._seconds / self._count
        if self._variance > 0:
            return min(max(0.0, self._covariance / self._variance), steepest)
        return 0.0 if self._flat else steepest

    def at(self, count: float) -> float:
        return max(0.0, self._seconds + self.slope * (count - self._count)) if self.num_points else 0.0

    def start(self, count: float, seconds: float) -> None:
        """Begins anew at a point."""
        self._count, self._seconds, self._variance, self._covariance = float(count), seconds, 0.0, 0.0
        self.num_points = 1

    def add(self, count: float, seconds: float) -> None:
        if self.num_points == 0:
            self.start(count, seconds)
            return
        self.num_points += 1
        gain = max(1 / self.num_points, 1 / MEMORY)
        along, above = count - self._count, seconds - self._seconds
        self._count += gain * along
        self._seconds += gain * above
        self._variance = (1 - gain) * (self._variance + gain * along * along)
        self._covariance = (1 - gain) * (self._covariance + gain * along * above)


class StepCosts:
    """What steps take, learnt from steps.

    Decode steps alone teach what decodes take; what others take beyond that teaches what prompts take. So the one is
    not forgotten while there is only the other.
    """

    def __init__(self) -> None:
        self.num_decode_steps = 0
        self._decodes = Line(flat=True)
        self._prompts = Line(flat=False)

    @property
    def are_known(self) -> bool:
        return self.num_decode_steps >= MIN_DECODE_STEPS and self._prompts.num_points > 0

    def decode_seconds(self, num_rows: int) -> float:
        """Of a step in which so many decode and nobody reads."""
        return self._decodes.at(num_rows)

    def prompt_seconds(self, num_tokens: float) -> float:
        """What so many prompt tokens add to a step; for none, what it takes that there is a chunk at all."""
        return self._prompts.at(num_tokens)

    @property
    def prompt_token_seconds(self) -> float:
        """What one more adds."""
        return max(self._prompts.slope, LEAST_SECONDS)

    def observe(self, num_rows: int, num_prompt_tokens: float, seconds: float) -> None:
        """A step has taken so long. Prompt tokens with a context count for more than one."""
        if not 0 < seconds < math.inf:
            return
        if num_prompt_tokens == 0:
            self._observe_decodes(num_rows, seconds)
            return
        expected = self.decode_seconds(num_rows) if self.num_decode_steps else 0.0
        if self.are_known:
            seconds = min(seconds, OUTLIER * (expected + self.prompt_seconds(num_prompt_tokens)))
        self._prompts.add(num_prompt_tokens, max(seconds - expected, LEAST_SECONDS))

    def _observe_decodes(self, num_rows: int, seconds: float) -> None:
        self.num_decode_steps += 1
        if self.num_decode_steps == 1:
            self._decodes.start(num_rows, seconds)
        elif self.num_decode_steps <= MIN_DECODE_STEPS:  # the quickest counts: the first ones warm up
            self._decodes.start(num_rows, min(seconds, self.decode_seconds(num_rows)))
        else:
            self._decodes.add(num_rows, min(seconds, OUTLIER * self.decode_seconds(num_rows)))


class Pace:
    """Sets the allowance of prompt tokens for each step of an engine whose steps compute ``budget`` tokens at most.

    ``context_cost``: what a token of context adds to what computing a token takes, as a part of what it takes without.
    """

    def __init__(self, factor: float, budget: int, context_cost: float = 0.0) -> None:
        self.costs = StepCosts()
        self.pressure = 0.0
        self._factor = factor
        self._budget = budget
        self._context_cost = context_cost
        self._num_trials = 0
        """Steps from which prompts were kept out, to see what decodes take."""

    def work(self, num_tokens: int, context: float) -> float:
        """So many tokens behind so many others, in tokens without context."""
        return num_tokens * (1 + self._context_cost * context)

    def observe(self, step: StepInput, seconds: float) -> None:
        """A step has taken so long: what the sizes of the next ones are judged by."""
        read = [chunk for chunk in step.chunks if not chunk.is_decode]
        work = sum(self.work(chunk.num_tokens, chunk.start + chunk.num_tokens / 2) for chunk in read)
        self.costs.observe(len(step.chunks) - len(read), work, seconds)

    def allowance(self, num_rows: int, num_prompts: int, token_work: float = 1.0) -> int:
        """Prompt tokens that the next step may read, if so many rows decode and so many prompts could be read, whose
        next tokens count as much as so many without context.

        To be asked once for each step, whether or not there are prompts. None but for ``MIN_DECODE_STEPS`` times.
        """
        if num_rows == 0:
            return self._budget
        too_many = max(0.0, num_prompts - 1 - min(1.0, num_rows / MANY_ROWS))
        self.pressure += (min(too_many / num_rows, MOST_PRESSURE) - self.pressure) / PRESSURE_MEMORY
        if math.isinf(self._factor) or (num_prompts - 1) * CROWD >= num_rows:
            return self._budget
        if max(self._num_trials, self.costs.num_decode_steps) < MIN_DECODE_STEPS:
            self._num_trials += num_prompts > 0
            return 0
        num_grains = self._num_grains(num_rows, 1 + PRESSURE_GAIN * self.pressure, token_work)
        return min(self._budget, max(1, num_grains) * GRAIN)

    def _num_grains(self, num_rows: int, gain: float, token_work: float) -> int:
        costs = self.costs
        if not costs.are_known:
            return self._bounded(gain * self._budget / UNKNOWN_SHARE / GRAIN)
        chunk_seconds, grain_seconds = costs.prompt_seconds(0), costs.prompt_token_seconds * GRAIN * token_work
        seconds = gain * (self._factor - 1) * costs.decode_seconds(num_rows) - chunk_seconds
        return max(self._bounded(seconds / grain_seconds), self._bounded(chunk_seconds / grain_seconds + 0.9))

    def _bounded(self, grains: float) -> int:
        """No more than the budget, however odd the clock was."""
        most = -(-self._budget // GRAIN)
        return int(max(0.0, grains)) if grains < most else most
