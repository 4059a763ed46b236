"""What the API process and a worker say to each other.

A message is a msgpack-encoded tagged struct behind a 4-byte big-endian length. The worker speaks first (``Hello``); the
API process asks what the model would take (``Plan``, as often as it likes) and has it loaded (``Load``); then requests,
cancels, pauses and resumes flow one way and one ``StepOutputs`` (of an encoder: ``EncoderOutputs``) per engine step the
other. A wrong version or a frame over ``MAX_MESSAGE_BYTES`` ends the connection: both sides ship together, so either is
a bug, nothing to negotiate.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgspec

from lmserve.grammar.tokenizer_text import TokenizerText
from lmserve.outputs import EncoderOutput, RequestOutput
from lmserve.runtime.interface import EncoderInput, MemoryPlan, PromptImage, RunnerInfo
from lmserve.sampling_params import SamplingParams

PROTOCOL_VERSION = 6
MAX_MESSAGE_BYTES = 64 * 2**20
HEADER = struct.Struct(">I")


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Worker: I am here."""

    version: int
    pid: int


Options = dict[str, str | int | float | bool | None]
"""A worker's configuration (``lmserve.config.ModelConfig``)."""


class Plan(msgspec.Struct, tag=True, frozen=True):
    """API process: what would this model take? ``reserved_bytes`` of the free memory are kept for others."""

    options: Options
    reserved_bytes: int


class Planned(msgspec.Struct, tag=True, frozen=True):
    """Worker: this."""

    plan: MemoryPlan


class Load(msgspec.Struct, tag=True, frozen=True):
    """API process: load this model; of what is free, leave ``reserved_bytes``."""

    options: Options
    reserved_bytes: int = 0


class LoadProgress(msgspec.Struct, tag=True, frozen=True):
    """Worker: how far loading is. ``fraction`` is in [0, 1]."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Worker: the model is loaded; requests may come."""

    info: RunnerInfo


class LoadFailed(msgspec.Struct, tag=True, frozen=True):
    """Worker: the model can be neither planned nor loaded; the process ends."""

    reason: str


class AddRequest(msgspec.Struct, tag=True, frozen=True):
    """API process: a request, already checked against the model's limits. ``sampling.n`` choices share the prompt."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int] = []
    priority: int = 0
    """Lower runs earlier."""
    images: list[PromptImage] = []
    """Of the prompt, in its order. Their files stay until the request has ended."""
    grammar: str = ""
    """What the output has to be, proved to be possible; ``UseVocabulary`` came before. Empty: anything."""


class UseVocabulary(msgspec.Struct, tag=True, frozen=True):
    """API process: the tokens of the model, for grammars. Comes once, if at all."""

    text: TokenizerText


class Encode(msgspec.Struct, tag=True, frozen=True):
    """API process: a request to an encoder, already checked against the model's limits."""

    request_id: str
    inputs: list[EncoderInput]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """API process: stop a request, or one choice of it."""

    request_id: str
    choice: int | None = None


class Pause(msgspec.Struct, tag=True, frozen=True):
    """API process: its reader is slow; compute nothing more for this request until ``Resume``."""

    request_id: str


class Resume(msgspec.Struct, tag=True, frozen=True):
    """API process: go on with a paused request."""

    request_id: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """API process: end now."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of one engine, as of the end of a step."""

    num_running: int = 0
    num_waiting: int = 0
    """Sequences; of an encoder, inputs. An encoder has none that run between two steps."""
    num_paused: int = 0
    """Sequences whose readers are slow; they neither run nor wait."""
    num_free_blocks: int = 0
    """Blocks that a request can have at once, cached ones included."""
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed (recomputed ones included, cached ones not)."""
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_encoded_images: int = 0
    """Images that went through the image encoder; those that were found encoded are not counted."""
    num_preemptions: int = 0
    num_cancelled: int = 0
    num_finished: int = 0


class StepOutputs(msgspec.Struct, tag=True, frozen=True):
    """Worker: the news of one step, for all its requests."""

    outputs: list[RequestOutput]
    stats: EngineStats


class EncoderOutputs(msgspec.Struct, tag=True, frozen=True):
    """Worker: the news of one step of an encoder."""

    outputs: list[EncoderOutput]
    stats: EngineStats


ToWorker = Plan | Load | UseVocabulary | AddRequest | Encode | Cancel | Pause | Resume | Shutdown
FromWorker = Hello | Planned | LoadProgress | Ready | LoadFailed | StepOutputs | EncoderOutputs

_encoder = msgspec.msgpack.Encoder()
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


class MessageTooLong(Exception):
    """A frame over ``MAX_MESSAGE_BYTES``, sent or announced."""


def encode(message: ToWorker | FromWorker) -> bytes:
    """The message with its length in front."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageTooLong(f"{type(message).__name__} of {len(body)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Length of the body behind a header."""
    (length,) = HEADER.unpack(header)
    if length > MAX_MESSAGE_BYTES:
        raise MessageTooLong(f"a frame of {length} bytes was announced, the limit is {MAX_MESSAGE_BYTES}")
    return int(length)
