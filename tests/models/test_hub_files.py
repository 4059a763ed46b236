from __future__ import annotations

import pytest

from lmserve.errors import InvalidRequest, ModelNotFound
from lmserve.models.hub_files import MAX_NAMED, choose_files

SIDE = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_own.py"]
QUANTIZED = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-BF16.gguf", "m-F16.gguf", "m-IQ4_XS.gguf", "mmproj-F16.gguf"]


def weights(*names: str, quantization: str | None = None) -> list[str]:
    """What is chosen besides the side files, which always are."""
    chosen = choose_files([*SIDE, *names], quantization)
    assert set(SIDE) < set(chosen)
    return sorted(set(chosen) - set(SIDE))


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "original/consolidated.00.pth", "onnx/model.onnx"], ["model.safetensors"]),
        (["model.safetensors", "onnx/config.json", "a.png", "README.md", ".gitattributes"], ["model.safetensors"]),
        (["model.safetensors", "checkpoint-500/model.safetensors", "runs/x.json"], ["model.safetensors"]),
        (["other.safetensors", "consolidated.safetensors"], ["other.safetensors"]),
        (["model.safetensors", "m-Q4_K_M.gguf"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "optimizer.bin", "rng_state_0.pth"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "m-Q4_K_M.gguf"], ["pytorch_model.bin"]),
        (["m-Q8_0.gguf"], ["m-Q8_0.gguf"]),
        (["m-Q8_0.gguf", "mmproj-F16.gguf", "imatrix.gguf"], ["m-Q8_0.gguf"]),
        (QUANTIZED, ["m-Q4_K_M.gguf"]),
    ],
)
def test_the_model_once_in_the_best_format(there: list[str], chosen: list[str]) -> None:
    assert weights(*there) == chosen


@pytest.mark.parametrize("stem", ["model-{:05}-of-00003.safetensors", "pytorch_model-{:05}-of-00003.bin"])
def test_all_shards_and_their_index(stem: str) -> None:
    shards = [stem.format(number) for number in (1, 2, 3)]
    index = f"{stem.partition('-')[0]}{stem[stem.rindex('.') :]}.index.json"
    assert weights(*shards, index, "consolidated.00.pth") == sorted([*shards, index])


def test_the_modules_of_an_embedding_model() -> None:
    wanted = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "model.safetensors"]
    assert weights(*wanted, "modules.json", "2_Dense/pytorch_model.bin") == [*wanted, "modules.json"]


@pytest.mark.parametrize(
    ("quantization", "chosen"),
    [("Q4_K_S", "m-Q4_K_S.gguf"), ("q4_k_m", "m-Q4_K_M.gguf"), ("F16", "m-F16.gguf"), ("IQ4_XS", "m-IQ4_XS.gguf")],
)
def test_the_quantization_asked_for(quantization: str, chosen: str) -> None:
    """As a word: F16 is not BF16. The projector of a vision model is no model."""
    assert weights(*QUANTIZED, "model.safetensors", quantization=quantization) == [chosen]


def test_all_parts_of_a_split_file() -> None:
    parts = [f"Q8_0/m-Q8_0-{number:05}-of-00002.gguf" for number in (1, 2)]
    assert weights(*QUANTIZED, *parts, quantization="Q8_0") == parts
    assert weights(*parts) == parts


@pytest.mark.parametrize("quantization", ["Q4_K", "Q2_K", "16"])
def test_a_quantization_that_is_not_there_lists_those_that_are(quantization: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^quantization: No GGUF file has '{quantization}'.*m-Q4_K_S.gguf") as e:
        choose_files([*SIDE, *QUANTIZED], quantization)
    assert e.value.param == "quantization"
    assert "mmproj" not in str(e.value)


def test_a_quantization_that_two_have() -> None:
    with pytest.raises(InvalidRequest, match="2 GGUF files have 'Q4_K_M'"):
        choose_files(["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "Q4_K_M")


def test_no_quantization_where_one_is_needed() -> None:
    with pytest.raises(InvalidRequest, match="must say which of these .*: m-Q5_K_M.gguf, m-Q8_0.gguf") as error:
        choose_files(["m-Q8_0.gguf", "m-Q5_K_M.gguf"], None)
    assert error.value.param == "quantization"


def test_the_list_of_a_refusal_ends() -> None:
    with pytest.raises(InvalidRequest) as error:
        choose_files([f"m-{number:03}.gguf" for number in range(500)], None)
    assert str(error.value).count(".gguf") == MAX_NAMED


def test_a_quantization_where_there_is_no_gguf() -> None:
    with pytest.raises(InvalidRequest, match="this one has none"):
        choose_files([*SIDE, "model.safetensors"], "Q4_K_M")


@pytest.mark.parametrize("others", [[], ["onnx/model.onnx"], ["tf_model.h5"], ["consolidated.00.pth"]])
def test_no_weights_that_can_be_read(others: list[str]) -> None:
    with pytest.raises(ModelNotFound, match="no weights"):
        choose_files([*SIDE, *others], None)
