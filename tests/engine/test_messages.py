from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmserve.engine import messages
from lmserve.engine.messages import (
    HEADER,
    AddRequest,
    Cancel,
    EngineStats,
    FromWorker,
    MessageTooLong,
    Ready,
    Shutdown,
    StepOutputs,
    ToWorker,
    body_length,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from lmserve.outputs import FinishReason, RequestOutput, TokenLogprobs
from lmserve.runtime.interface import RunnerInfo
from lmserve.sampling_params import SamplingParams

INFO = RunnerInfo(
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    attention_backend="cpu",
    lane="packed",
    num_parameters=1,
    weight_bytes=4,
    vocab_size=10,
    max_model_len=64,
    block_size=4,
    num_blocks=16,
    kv_cache_bytes=1024,
    max_num_seqs=4,
    max_num_batched_tokens=32,
)
SAMPLING = SamplingParams(max_tokens=5, seed=-(2**63), logit_bias=((3, -100.0), (4, 0.5)), stop_token_ids=(1, 2))


@pytest.mark.parametrize(
    "message",
    [AddRequest("a", [1, 2, 3], SAMPLING, [2], -1), Cancel("a"), Cancel("a", 3), Shutdown()],
    ids=lambda message: type(message).__name__,
)
def test_to_worker_round_trip(message: ToWorker) -> None:
    assert decode_to_worker(encode(message)[HEADER.size :]) == message


@pytest.mark.parametrize(
    "message",
    [
        Ready(INFO),
        StepOutputs(
            [
                RequestOutput("a", 0, (5,), (TokenLogprobs(-0.5, ((5, -0.5), (6, -1.5))),), 16, FinishReason.STOP),
                RequestOutput("b", 1, error="lost"),
                RequestOutput("c", 0, prompt_logprobs=(TokenLogprobs(-0.25, ()), TokenLogprobs(-1.0, ((7, -1.0),)))),
            ],
            EngineStats(num_running=2),
        ),
    ],
    ids=lambda message: type(message).__name__,
)
def test_from_worker_round_trip(message: FromWorker) -> None:
    assert decode_from_worker(encode(message)[HEADER.size :]) == message


def test_the_header_says_the_length() -> None:
    frame = encode(Cancel("abc"))
    assert body_length(frame[: HEADER.size]) == len(frame) - HEADER.size


def test_neither_side_sends_or_accepts_a_frame_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MessageTooLong):
        body_length(HEADER.pack(messages.MAX_MESSAGE_BYTES + 1))
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(MessageTooLong, match="AddRequest"):
        encode(AddRequest("a", list(range(200)), SAMPLING))


@given(st.binary(max_size=200))
def test_noise_is_refused_as_a_message(noise: bytes) -> None:
    for decode in (decode_to_worker, decode_from_worker):
        try:
            decode(noise)
        except (msgspec.DecodeError, msgspec.ValidationError):
            continue
