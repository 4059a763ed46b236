"""The shortest time that a step can take: what it has to read, over how fast memory is, or what it has to multiply,
over how fast products are, whichever is longer.

Both rates are measured in the same run (``limits``), not taken from a data sheet. Of memory, weights and keys and
values count, each once a step; activations, embeddings of the step's tokens and what is written are small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.setting import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The numbers of a model that decide what a step costs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    body: int
    """Weights that every token is multiplied with in the layers, experts left out."""
    head: int
    """Weights of the last product, over the vocabulary. Tied to the embeddings or not, a step reads them once."""
    expert: int = 0
    """Weights of one expert, over all layers."""
    num_experts: int = 0
    experts_per_token: int = 0
    num_bytes: int = 2
    """Of a number, weights and KV cache alike."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.num_bytes

    @property
    def flops_per_pair(self) -> int:
        """Of attention, for one query that sees one key: two products, in all layers and heads."""
        return 4 * self.num_layers * self.num_heads * self.head_size

    def experts_read(self, num_tokens: int) -> float:
        """Experts of a layer that tokens want together, expected where all are equally likely: with random weights
        they are, nearly; trained ones want fewer."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1 - (1 - self.experts_per_token / self.num_experts) ** num_tokens)

    @property
    def weights_per_token(self) -> int:
        """That one token is multiplied with, the last product left out."""
        return self.body + self.expert * self.experts_per_token


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be done."""

    num_bytes: float
    """Read from memory."""
    flops: float

    def seconds(self, limits: Limits) -> float | None:
        """At least; None if the limits are not known."""
        if not limits.known:
            return None
        return max(self.num_bytes / limits.bytes_per_second, self.flops / limits.flops)


def decode_step(size: ModelSize, rows: int, context: float) -> Work:
    """A step that takes so many sequences on by one token. ``context``: tokens that each sees, on average."""
    weights = size.body + size.head + size.expert * size.experts_read(rows)
    num_bytes = weights * size.num_bytes + rows * context * size.kv_bytes_per_token
    flops = rows * (2 * (size.weights_per_token + size.head) + context * size.flops_per_pair)
    return Work(num_bytes, flops)


def prefill(size: ModelSize, num_tokens: int, before: int = 0) -> Work:
    """A prompt's tokens behind ``before`` others, the last of them with logits."""
    weights = size.body + size.head + size.expert * size.experts_read(num_tokens)
    num_bytes = weights * size.num_bytes + (before + num_tokens) * size.kv_bytes_per_token
    flops = num_tokens * 2 * size.weights_per_token + 2 * size.head
    flops += causal_pairs(num_tokens, before) * size.flops_per_pair
    return Work(num_bytes, flops)


def causal_pairs(num_tokens: int, before: int = 0) -> int:
    """Queries times the keys that each sees: those before it and itself."""
    return num_tokens * before + num_tokens * (num_tokens + 1) // 2
