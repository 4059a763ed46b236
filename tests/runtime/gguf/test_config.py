"""Models from GGUF files are the models that were written, for every architecture that transformers maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.loader import load_model, read_model_config
from lmserve.runtime.memory_plan import plan_memory
from tests.runtime.gguf.gguf_cases import CASES
from tests.runtime.gguf.gguf_files import build, write
from tests.runtime.tiny_models import VOCAB_SIZE

TOLERANCE, LOOSE = 1e-5, 1e-3
"""Of the logits' spread."""
NOT_SERVED = {
    "t5": "encoder-decoder",
    "umt5": "encoder-decoder",
    "deci": "transformers has no class for it without the model's own code",
    "mistral": "files of Mistral's models say llama",
    "tokenizer": "no architecture",
    "general": "no architecture",
}


def config(path: Path) -> ModelConfig:
    return ModelConfig(model=str(path), device="cpu", dtype="float32")


def load(path: Path) -> PreTrainedModel:
    model, _ = load_model(config(path))
    return model


def logits(model: PreTrainedModel, length: int) -> torch.Tensor:
    tokens = torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))
    call: Any = model
    with torch.inference_mode():
        found: torch.Tensor = call(input_ids=tokens).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_model_that_was_written(case: str, tmp_path: Path) -> None:
    stock = build(case)
    write(tmp_path / "tiny.gguf", case, stock)
    model = load(tmp_path / "tiny.gguf")
    assert type(model) is type(stock)
    for length in (40, 200):  # beyond windows; beyond what a stretched rope was trained with
        expected = logits(stock, length)
        difference = (logits(model, length) - expected).abs().max() / expected.std()
        # Qwen 3.5's decay rates are in the file as exponentials, and rounded.
        assert difference <= (LOOSE if case.startswith("qwen35") else TOLERANCE), (
            f"{length} tokens: {difference:.2g} of their spread"
        )


def test_no_architecture_is_left_out() -> None:
    mapped = {name.replace("_", "-") for name in GGUF_SUPPORTED_ARCHITECTURES}
    served = {architecture for architecture, _, _ in CASES.values()}
    alike = {name.replace("-", "") for name in served} | served
    assert {name for name in mapped if name not in alike and name.replace("-", "") not in alike} == set(NOT_SERVED)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_quantized_experts_are_read(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """gpt-oss, whose experts transformers does not read: as the package dequantizes them."""
    stock = build("gpt-oss", hidden_size=64)
    write(tmp_path / "plain.gguf", "gpt-oss", stock)
    requantize(tmp_path / "plain.gguf", tmp_path / "few-bits.gguf", kind)
    plain, few = load(tmp_path / "plain.gguf"), load(tmp_path / "few-bits.gguf")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    exact, rounded = plain.state_dict()[name], few.state_dict()[name]
    by_package = exact.transpose(1, 2).numpy()
    for offset in (0, 1):
        blocks = gguf.quantize(by_package[:, offset::2], kind)
        expected = torch.from_numpy(gguf.dequantize(blocks, kind))
        assert torch.equal(rounded.transpose(1, 2)[:, offset::2], expected)
    assert not torch.equal(exact, rounded)


def requantize(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """The file again, its experts in fewer bits."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gpt-oss")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[1] if array else None)
    for tensor in reader.tensors:
        if "_exps.weight" in tensor.name:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


REFUSED: dict[str, tuple[str, Any, str]] = {
    "key that nobody knows": (
        "llama",
        lambda w: w.add_float32("llama.attention.wobble", 0.3),
        "llama.attention.wobble",
    ),
    "attention scale": ("llama", lambda w: w.add_attention_scale(0.3), "llama.attention.scale"),
    "scaled residuals": ("qwen3", lambda w: w.add_residual_scale(0.3), "qwen3.residual_scale"),
    "both directions": ("llama", lambda w: w.add_causal_attention(False), "llama.attention.causal"),
    "other gates": (
        "qwen3moe",
        lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
        "qwen3moe.expert_gating_func",
    ),
    "grouped experts": ("qwen3moe", lambda w: w.add_expert_group_count(4), "qwen3moe.expert_group_count"),
    "another stretched rope": ("qwen2", lambda w: w.add_string("qwen2.rope.scaling.type", "su"), "rope.scaling.type"),
    "scaled attention": ("qwen2-yarn", lambda w: w.add_rope_scaling_attn_factors(1.3), "rope.scaling.attn_factor"),
    "values of another width": ("stablelm", lambda w: w.add_value_length(3), "stablelm.attention.value_length"),
    "rope where there is none": ("bloom", lambda w: w.add_rope_freq_base(3.0), "bloom.rope.freq_base"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_says_and_nobody_understands_is_refused(name: str, tmp_path: Path) -> None:
    case, say, key = REFUSED[name]
    write(tmp_path / "tiny.gguf", case, build(case), say)
    for ask in (lambda: load(tmp_path / "tiny.gguf"), lambda: plan_memory(config(tmp_path / "tiny.gguf"))):
        with pytest.raises(ModelLoadFailed) as caught:
            ask()
        assert key in str(caught.value)
        assert "another model" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tensor_that_no_weight_takes_is_a_refusal(tmp_path: Path) -> None:
    """A bias that the class does not have: left out, it would be another model."""
    stock = build("llama")
    bias = torch.ones(48).numpy()
    write(tmp_path / "tiny.gguf", "llama", stock, lambda writer: writer.add_tensor("blk.0.attn_output.bias", bias))
    with pytest.raises(ModelLoadFailed, match=r"takes|has \d+"):
        load(tmp_path / "tiny.gguf")


def test_a_weight_that_no_tensor_has_is_a_refusal(tmp_path: Path) -> None:
    stock = build("bloom")
    state = {name: tensor for name, tensor in stock.state_dict().items() if "h.1.input_layernorm.bias" not in name}
    setattr(stock, "state_dict", lambda: state)  # noqa: B010  (mypy: a method)
    write(tmp_path / "tiny.gguf", "bloom", stock)
    with pytest.raises(ModelLoadFailed, match=r"lack: transformer\.h\.1\.input_layernorm\.bias"):
        load(tmp_path / "tiny.gguf")


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    name = "tiny-00001-of-00003.gguf"
    write(tmp_path / name, "llama", build("llama"), lambda writer: writer.add_uint16("split.count", 3))
    with pytest.raises(ModelLoadFailed, match="one of 3 parts"):
        load(tmp_path / name)


def test_rope_frequencies_of_no_llama_are_refused(tmp_path: Path) -> None:
    divisors = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0]).numpy()
    write(tmp_path / "tiny.gguf", "llama", build("llama"), lambda w: w.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(ModelLoadFailed, match="rope_freqs"):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_largest_scale_attention_by_the_models_width(family: str, layers: int, tmp_path: Path) -> None:
    for count, expected in ((layers, 48 // 4), (layers - 1, 16)):
        writer = gguf.GGUFWriter(tmp_path / f"{count}.gguf", family)
        writer.add_block_count(count)
        writer.add_embedding_length(48)
        writer.add_head_count(4)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_token_list([f"t{i}" for i in range(VOCAB_SIZE)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert read_model_config(config(tmp_path / f"{count}.gguf")).config.query_pre_attn_scalar == expected
