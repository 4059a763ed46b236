"""Weights in 8 and 4 bits, natively and by torch's own operators; docs/quantization.md has what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmserve.config import ModelConfig
from lmserve.engine.core import EngineCore
from lmserve.engine.messages import AddRequest
from lmserve.engine.scheduler import SchedulerConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.build import assemble_runner, build_runner
from lmserve.runtime.memory_plan import plan_memory, weight_bytes
from lmserve.runtime.model_runner import PackedModelRunner
from lmserve.runtime.native.compiler import NativeUnavailable, check_available
from lmserve.runtime.quantization import (
    GROUP,
    Int4Linear,
    Int8Linear,
    Quantization,
    check_quantization,
    multiplies_fp8,
    quantize,
    quantize_by_torchao,
    quantized_bytes,
)
from lmserve.sampling_params import SamplingParams
from tests.runtime.tiny_models import VOCAB_SIZE, build_tiny, in_dtype
from tests.tiny_folder import write_tiny_folder

KINDS: tuple[Quantization, ...] = ("int8", "int4")
SIZES = {"hidden_size": 64, "intermediate_size": 96}
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (40, 3, 17, 25)
]


def four_bit_weight(outputs: int, inputs: int) -> Tensor:
    """Weights that 4 bits in groups of 32 can say exactly: what a GGUF file in Q4_0 or Q4_1 holds."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(0, 16, (outputs, inputs // GROUP, GROUP), generator=generator)
    steps[..., 0], steps[..., 1] = 0, 15
    scale = 2.0 ** torch.randint(-6, -3, (outputs, inputs // GROUP, 1), generator=generator)
    return (scale * (steps - 8)).view(outputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_4_bits_is_the_product_with_what_it_counts_as(dtype: torch.dtype, rows: int, bias: bool) -> None:
    linear = nn.Linear(96, 48, bias=bias).to(dtype).requires_grad_(False)
    layer, x = Int4Linear(linear), torch.randn(2, rows, 96).to(dtype)
    with torch.inference_mode():
        weight = layer.weight.double()
        expected = x.double() @ weight.t() + (0 if linear.bias is None else linear.bias.double())
        got = layer(x)
    assert (got.shape, got.dtype) == ((2, rows, 48), dtype)
    assert (got.double() - expected).norm() / expected.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4)
    steps = (linear.weight.detach().double().view(48, -1, GROUP).amax(-1) + 1) / 15
    assert (weight - linear.weight.double()).abs().max() < steps.max()


def test_what_is_in_4_bits_already_loses_nothing() -> None:
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear.weight.copy_(four_bit_weight(32, 64))
    assert torch.equal(Int4Linear(linear).weight, linear.weight)


def test_odd_layers_keep_their_numbers() -> None:
    odd = nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 30), nn.Linear(32, 32))
    assert quantize(odd, "int4") == 1
    assert [type(layer) for layer in odd] == [nn.Linear, nn.Linear, Int4Linear]


def test_the_head_keeps_8_bits() -> None:
    model: Any = build_tiny("llama", **SIZES)
    quantize(model, "int4")
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Int4Linear | Int8Linear)]
    assert sum(isinstance(layer, Int4Linear) for layer in layers) == len(layers) - 1


def runner(kind: str, backend: str, dtype: torch.dtype) -> PackedModelRunner:
    model = in_dtype(build_tiny("llama", **SIZES), dtype)
    config = ModelConfig(
        model="tiny",
        quantization=kind,
        attention_backend=backend,
        kv_cache_memory=4 * 2**20,
        max_model_len=128,
        max_num_seqs=8,
        block_size=8,
    )
    return assemble_runner(model, config, dtype)


def with_rounded_weights(kind: Quantization) -> PreTrainedModel:
    """The model in float32, its weights what they are in so few bits."""
    rounded, model = build_tiny("llama", **SIZES), build_tiny("llama", **SIZES)
    quantize(rounded, kind)
    with torch.inference_mode():
        for name, module in rounded.named_modules():
            if isinstance(module, Int8Linear | Int4Linear):
                model.get_submodule(name).weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    return model


def engine(kind: str, backend: str, dtype: torch.dtype) -> EngineCore:
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=128)
    return EngineCore(runner(kind, backend, dtype), limits)


def prompt_scores(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """The log-probability of each of a prompt's tokens but the first."""
    with torch.inference_mode():
        scores = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    found: Tensor = scores[torch.arange(len(prompt) - 1), prompt[1:]]
    return found


def answers(core: EngineCore, *, together: bool) -> dict[str, tuple[list[int], list[float]]]:
    """Greedy tokens, and the log-probabilities of the prompts."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, prompt_logprobs=0)
        core.add_request(AddRequest(str(number), prompt, sampling))
        while core.has_work and (not together or number == len(PROMPTS) - 1):
            for output in core.step():
                tokens, scores = found.setdefault(output.request_id, ([], []))
                tokens.extend(output.token_ids)
                scores.extend(entry.logprob for entry in output.prompt_logprobs)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_nearly_the_same_and_company_changes_nothing(
    kind: Quantization, backend: str, dtype: torch.dtype
) -> None:
    core = engine(kind, backend, dtype)
    alone, together = answers(core, together=False), answers(core, together=True)
    if dtype == torch.float32:
        assert [alone[name][0] for name in alone] == [together[name][0] for name in alone]
    exact, rounded = build_tiny("llama", **SIZES), with_rounded_weights(kind)
    num_scores = sum(len(prompt) - 1 for prompt in PROMPTS)
    distance = {"exact": 0.0, "rounded": 0.0}
    for number, prompt in enumerate(PROMPTS):
        scores = torch.tensor(alone[str(number)][1])
        for name, model in (("exact", exact), ("rounded", rounded)):
            distance[name] += float((scores - prompt_scores(model, prompt)).abs().sum()) / num_scores
    # Random weights: each of their bits counts. What remains are activations in 8 bits or bfloat16.
    assert distance["rounded"] < {"int8": 0.06, "int4": 0.2}[kind]
    if kind == "int4":
        assert distance["exact"] > 2 * distance["rounded"], "the weights are not in 4 bits"


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_is(kind: Quantization) -> None:
    native = True
    try:
        check_available()
    except NativeUnavailable:
        native = False
    infos = {backend: runner(kind, backend, torch.bfloat16).info for backend in ("auto", "sdpa")}
    assert infos["auto"].lane == ("native" if native else "packed")
    assert infos["sdpa"].lane == "packed"
    model = in_dtype(build_tiny("llama", **SIZES), torch.bfloat16)
    for info in infos.values():
        assert info.dtype == f"{kind} and bfloat16"
        assert info.weight_bytes == weight_bytes(model, torch.device("cpu"), torch.bfloat16, kind)
    assert infos["auto"].weight_bytes < weight_bytes(model, torch.device("cpu"), torch.bfloat16)
    assert infos["auto"].fingerprint != runner("none", "auto", torch.bfloat16).info.fingerprint


def test_fewer_bits_take_less_memory() -> None:
    linear = nn.Linear(256, 512)
    plain = linear.weight.numel() * 2
    assert quantized_bytes(linear, "int8", torch.bfloat16) < 0.55 * plain
    assert quantized_bytes(linear, "int4", torch.bfloat16) < 0.35 * plain


TORCHAO = """
import sys
import torch
from lmserve.runtime.quantization import quantize_by_torchao
from tests.runtime.tiny_models import build_tiny

model, plain = (build_tiny("llama", hidden_size=64, intermediate_size=96) for _ in range(2))
quantize_by_torchao(model, sys.argv[1])
ids = torch.arange(3, 43)[None]
with torch.inference_mode():
    print(float((model(ids).logits.softmax(-1) - plain(ids).logits.softmax(-1)).abs().max()))
"""


@pytest.mark.parametrize(("kind", "loss"), [("int8", 0.02), ("fp8", 0.06)])
def test_other_devices_are_served_by_torchao(kind: str, loss: float) -> None:
    """Its 8-bit layers run on a CPU, too; for those in 4 bits, and for products of 8-bit floats, a GPU is needed.

    scripts/setup.sh puts torchao beside the environment, where transformers does not find it.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(sys.prefix) / "torchao")])
    done = subprocess.run(
        [sys.executable, "-c", TORCHAO, kind],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.split()[-1]) < loss


def test_without_torchao_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelLoadFailed, match="int8 on this device needs torchao"):
        quantize_by_torchao(build_tiny("llama"), "int8")


def test_what_the_device_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadFailed, match="quantization fp8 is for NVIDIA GPUs; on cpu there are int8 and int4"):
        check_quantization("fp8", torch.device("cpu"), None)
    for kind in ("none", "int8", "int4"):
        check_quantization(kind, torch.device("cpu"), build_tiny("llama").config)


@pytest.mark.parametrize(
    ("capability", "dtype", "does"),
    [((8, 9), torch.bfloat16, True), ((10, 0), torch.bfloat16, True), ((8, 6), torch.bfloat16, False)]
    + [((9, 0), torch.float16, False), ((9, 0), torch.float32, False)],
)
def test_activations_are_in_8_bit_floats_where_a_gpu_multiplies_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, does: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_fp8(torch.device("cuda", 0), dtype) == does
    assert not multiplies_fp8(torch.device("cpu"), dtype)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path, method: str) -> None:
    """Read from its files, before any weight is."""
    folder = write_tiny_folder(tmp_path / "tiny")
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "quantization_config": {"quant_method": method}}), encoding="utf-8")
    config = ModelConfig(model=str(folder), quantization="int8", device="cpu")
    with pytest.raises(ModelLoadFailed, match=rf"quantized already \({method}\); leave it at none"):
        plan_memory(config)
    with pytest.raises(ModelLoadFailed, match=rf"quantized already \({method}\)"):
        build_runner(config)
