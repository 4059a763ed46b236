"""The border between engine and runtime: what the engine may know of tensors. Imports no torch.

The engine decides, in token ids and block ids, what one step computes (``StepInput``); a ``ModelRunner`` computes it
and gives back one token for each sequence that asked for one (``StepOutput``). Rows of per-sequence state live on the
device in *slots*; the engine hands the slots out and says when one gets a new owner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import TokenLogprobs
from lmserve.sampling_params import SamplingParams

Task = Literal["generate", "embed", "score"]
"""What a loaded model does: continue a text, make a vector of one, or say how well two of them belong together."""

ImageReading = Literal["none", "causal", "whole"]
"""Whether prompts may hold images, and what their tokens see. ``none``: they may not. ``causal``: what stands before,
as text does, so that a step may end inside an image. ``whole``: each other, too, so that it may not."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of a GPU, in bytes, as its worker saw it when the model was loaded."""

    total_bytes: int
    own_bytes: int
    """The worker's."""
    identifier: str = ""
    """The device's own, as the driver writes it; empty: not known."""


FRESH_STATE, KEPT_STATE = -1, -2
"""What a sequence's recurrent state begins with, instead of a row of saved states: nothing; what its slot holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """What a loaded model is and what it can hold. Sent to the API process when the worker is ready."""

    architecture: str
    """The model's class in transformers."""
    model_type: str = ""
    """The family, by its name in transformers: llama, qwen3, …"""
    device: str
    dtype: str
    attention_backend: str
    lane: str
    """How a step is computed: ``native`` or ``packed`` as one forward, ``state`` or ``serial`` in turn."""
    num_parameters: int
    weight_bytes: int
    vocab_size: int
    max_model_len: int
    """Tokens that one sequence may have, prompt and output together."""
    block_size: int
    """Tokens that one KV block holds."""
    num_blocks: int
    kv_cache_bytes: int
    max_num_seqs: int
    """Slots."""
    max_num_batched_tokens: int
    """Tokens that one step may compute."""
    launches_ahead: bool = False
    """Whether a step may be launched before the one before it is collected, and gains by it: the device computes while
    the host is busy with what came out last."""
    context_cost: float = 0.0
    """What a token of context adds to what computing a token takes, as a part of what it takes without context."""
    num_saved_states: int | None = None
    """Rows for copies of recurrent states, without which no prefix can be shared. None: the model has no such states,
    and blocks are all that a prefix needs."""
    whole_prompts: bool = False
    """Whether all that is known of a sequence has to be computed in one chunk: the model's own code does not go on from
    a state with more than one token."""
    task: Task = "generate"
    images: ImageReading = "none"
    no_images: str = ""
    """Why a model that could read images may not, a sentence; empty if it is made for text only."""
    row_size: int = 0
    """Numbers that an encoder gives for one input: the embedding's size, or the number of labels. 0: it generates."""
    load_seconds: float = 0.0
    device_memory: DeviceMemory | None = None
    """None: on a CPU, where everybody can look."""
    lane_reason: str = ""
    """Why no faster lane would do, in clauses; empty if it is the fastest."""
    fingerprint: str = ""
    """Short hash of everything that decides the logits besides the request: weights, dtype, device, versions."""

    @property
    def kv_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model would take of a device's memory, in bytes, known before its weights are read."""

    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    weight_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    activation_bytes: int
    """Of the largest step, sampling included, and of captured ones."""
    fixed_bytes: int
    """What a worker takes whatever its model is: the libraries, a device's context."""
    free_bytes: int
    """What a new worker could have; what is kept for others is taken off."""
    share_bytes: int = 0
    """What it could have at most if all others went; 0: all that there is."""
    loading_bytes: int = 0
    """What its weights take while they are brought into fewer bits; 0: never more than in the end."""

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes + self.fixed_bytes

    @property
    def peak_bytes(self) -> int:
        """What it takes when it takes most."""
        return max(self.total_bytes, self.loading_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.free_bytes


@dataclass(frozen=True, slots=True)
class PromptImage:
    """One image of a prompt."""

    start: int
    """Where its first placeholder token stands."""
    end: int
    """Behind its last one; other tokens may stand between them."""
    content: str
    """Hash of its features: images with the same one are the same to the model."""
    file: str
    """Where its features are, as arrays by the names that the model's image encoder knows (safetensors)."""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot: at its first step, and again after a preemption."""

    slot: int
    token_ids: tuple[int, ...]
    """All tokens so far: the prompt and, after a preemption, the output."""
    num_prompt_tokens: int
    sampling: SamplingParams
    choice: int
    eos_token_ids: tuple[int, ...] = ()
    """Held back, like the stop tokens, until ``sampling.min_tokens`` are there."""
    images: tuple[PromptImage, ...] = ()
    """In the order of the prompt."""
    grammar: str = ""
    """What the output has to be (``lmserve.grammar``); empty for anything."""
    state: int = FRESH_STATE
    """Of models with recurrent states: the row of the saved one to begin with, or ``FRESH_STATE``, or ``KEPT_STATE``
    for a sequence that is told again because a step failed."""


@dataclass(frozen=True, slots=True)
class StateSave:
    """The recurrent state behind the first ``num_tokens`` tokens of a sequence goes to a row of saved states."""

    num_tokens: int
    row: int


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens ``[start, start + num_tokens)`` of the sequence in ``slot``, to be computed in this step.

    A chunk whose last token is the sequence's newest one samples the next token. The token at the newest position of a
    decoding sequence is the one that the last step sampled: the runner has it on the device already.
    """

    slot: int
    start: int
    num_tokens: int
    block_table: list[int]
    """The KV blocks in order, enough for ``start + num_tokens`` tokens. The runner reads it only."""
    samples: bool
    prompt_logprobs: range = range(0)
    """Positions in the chunk whose next prompt token's log-probability is wanted. The prompt's last token has none."""
    saves: tuple[StateSave, ...] = ()
    """In ascending order, each behind a token of the chunk. In a step, sequences take their states before any is saved.
    """

    @property
    def is_decode(self) -> bool:
        """A prompt of one token counts as one, too."""
        return self.samples and self.num_tokens == 1


@dataclass(frozen=True, slots=True)
class StepInput:
    """One ragged step. Decodes (one token, samples) come first, then prefill chunks; the order is the scheduler's."""

    chunks: list[ScheduledChunk]
    new_sequences: list[NewSequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """``token_ids`` and ``logprobs``: one entry for each chunk with ``samples``, in the order of the chunks."""

    token_ids: list[int]
    """-1 where nothing could be drawn: the logits are not numbers, or no token is allowed."""
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry for each position in the chunks' ``prompt_logprobs``, chunk after chunk."""
    num_encoded_images: int = 0
    """Images that went through the image encoder for this step."""


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One text for an encoder, or one pair of texts, encoded."""

    token_ids: list[int]
    token_type_ids: list[int] = field(default_factory=list)
    """As many as there are tokens: which of a pair's texts each belongs to. Empty: all to the first."""
    num_prompt_tokens: int = 0
    """At the beginning, of an instruction: some models leave them out of the vector."""


class FatalRunnerError(Exception):
    """The device can no longer be trusted (a CUDA error, say). The worker has to end; it is started again."""


class SequenceFailed(Exception):
    """One sequence of a step cannot be computed (an image of it cannot be read, say). No other was computed either."""

    def __init__(self, slot: int) -> None:
        super().__init__(f"The sequence in slot {slot} cannot be computed.")
        self.slot = slot


class ModelRunner(Protocol):
    """One model on its device.

    ``launch`` starts a step and may return before it is computed; ``collect`` waits for the oldest that is in flight.
    There are at most two, and never more than one unless ``info.launches_ahead``. Steps are computed in the order of
    their launches, so that a slot or a block may have another owner in the next one.

    Recurrent states move on with a step, and rows of saved ones are written, only if the next step does not tell of its
    sequences again (``NewSequence.state``): a step that fails can be tried again.

    ``SequenceFailed`` comes from ``launch`` and means that the step may be tried again without one sequence, the others
    told anew. Any other exception than ``FatalRunnerError`` means that this step's sequences are lost and nothing else.
    """

    @property
    def info(self) -> RunnerInfo: ...

    def launch(self, step: StepInput) -> None: ...

    def collect(self) -> StepOutput: ...

    def use_vocabulary(self, text: TokenizerText) -> None:
        """The model's tokens, for grammars. Comes before the first of them."""
        ...

    def prepare_grammar(self, grammar: str) -> None:
        """A sequence will soon come with it. Returns at once."""
        ...

    def use_idle_time(self) -> bool:
        """Does a few milliseconds' worth of what makes later steps shorter; whether there is more of it to do."""
        ...


@runtime_checkable
class EncoderRunner(Protocol):
    """One encoder on its device: each input at once and as a whole, nothing is kept between two calls.

    Exceptions mean what they mean for a ``ModelRunner``.
    """

    @property
    def info(self) -> RunnerInfo: ...

    def encode(self, inputs: list[EncoderInput]) -> list[bytes]:
        """A row of float32 (``info.row_size``, little-endian) for each input, in their order."""
        ...
