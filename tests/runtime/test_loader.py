from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.model_types.tiny import Kind, build
from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.loader import (
    choose_device,
    choose_dtype,
    dtype_of,
    fingerprint,
    generating_class,
    load_model,
    native_context_length,
    read_model_config,
)
from lmserve.runtime.memory_plan import hollow_model
from tests.runtime.tiny_models import build_tiny, in_dtype

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as a Hugging Face folder in bfloat16."""
    in_dtype(build_tiny("llama"), torch.bfloat16).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def config(model: Path | str, **overrides: str) -> ModelConfig:
    return ModelConfig(model=str(model), model_id="tiny", device="cpu", **overrides)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("causal", "llama"),
        ("image-text", "llava"),
        ("image-text", "chameleon"),  # makes tokens of pictures; only the other table has it
        ("image-text", "emu3"),  # both tables have it, with another class each
        ("causal", "emu3"),  # its language model, which neither has
        ("causal", "mllama"),
        ("image-text", "mistral4"),  # has no image encoder, and only the other table has it
        ("causal", "gemma3"),
    ],
)
def test_the_class_is_the_one_that_the_files_name(kind: Kind, model_type: str, tmp_path: Path) -> None:
    made = build(kind, model_type)
    made.save_pretrained(tmp_path)
    assert type(hollow_model(made.config, generating_class(made.config), trust_remote_code=False)) is type(made)
    assert type(load_model(config(tmp_path, dtype="float32"))[0]) is type(made)


def test_loads_a_folder_for_inference(folder: Path) -> None:
    model, dtype = load_model(config(folder, dtype="float32"))
    assert dtype == torch.float32
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert native_context_length(model) == 512


@pytest.mark.parametrize("name", ["no/such/place at all", "/no/such/folder"])
def test_a_missing_model_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadFailed) as caught:
        load_model(config(name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=str(tmp_path)):
        load_model(config(tmp_path))


def test_a_broken_weight_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a weight file at all")
    with pytest.raises(ModelLoadFailed):
        load_model(config(folder))


def test_auto_dtype() -> None:
    assert choose_dtype("auto", torch.float32, CPU) == torch.float32
    assert choose_dtype("auto", None, CPU) == torch.float32
    half = choose_dtype("auto", torch.float16, CPU)
    assert half in (torch.bfloat16, torch.float32), "float16 is slow on a CPU"
    assert choose_dtype("auto", torch.bfloat16, CPU) == half
    assert choose_dtype("float16", torch.float32, CPU) == torch.float16


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadFailed, match="cuda"):
            choose_device("cuda")


def test_fingerprint_follows_what_decides_the_logits(folder: Path) -> None:
    model, dtype = load_model(config(folder, dtype="float32"))
    first = fingerprint(config(folder), model, dtype, "cpu")
    assert first == fingerprint(config(folder), model, dtype, "cpu")
    assert first != fingerprint(config(folder), model, torch.bfloat16, "cpu")
    assert first != fingerprint(config(folder), model, dtype, "reference")
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert first != fingerprint(config(folder), model, dtype, "cpu")


def test_weights_that_stay_quantized_keep_their_own_format(folder: Path) -> None:
    source = read_model_config(config(folder))
    assert source.checkpoint_dtype == torch.bfloat16
    assert dtype_of(config(folder), source) == choose_dtype("auto", torch.bfloat16, CPU)
    for method, expected in (("torchao", torch.bfloat16), ("fp8", choose_dtype("auto", torch.bfloat16, CPU))):
        source.config.quantization_config = {"quant_method": method}
        assert dtype_of(config(folder), source) == expected
        assert dtype_of(config(folder, dtype="float32"), source) == torch.float32


def test_weights_of_other_sizes_are_refused(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**content, "intermediate_size": 100}))
    with pytest.raises(ModelLoadFailed, match="other sizes than its configuration says"):
        load_model(config(folder))


def test_a_weight_that_no_file_has_is_a_refusal(folder: Path) -> None:
    """transformers would make it by chance, with a warning."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=r"lack: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(config(folder))


def test_experts_are_multiplied_in_groups(tmp_path: Path) -> None:
    """By torch's grouped products, not one expert after the other."""
    in_dtype(build_tiny("qwen3-moe"), torch.bfloat16).save_pretrained(tmp_path / "experts")
    model, _ = load_model(config(tmp_path / "experts"))
    assert model.config._experts_implementation == "grouped_mm"
