"""Our vectors against sentence-transformers' own, from the same folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Normalize, Pooling

from lmserve.errors import ModelLoadFailed
from lmserve.models.starter import STARTERS, find_source
from lmserve.runtime.interface import EncoderInput
from tests.runtime.encoder.tiny_encoders import (
    CONFIGS,
    MAX_LENGTH,
    encode_texts,
    load,
    make_texts,
    vectors,
    write_encoder,
)
from tests.service.tokenizers_for_tests import smollm2_path

TOLERANCE = 1e-5
LANES = {
    "bert": "packed",
    "xlm-roberta": "packed",
    "modernbert": "packed",
    "distilbert": "packed",
    "mpnet": "padded",
    "qwen3": "packed",
}
MODES = ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def theirs(folder: Path, texts: list[str], **options: Any) -> NDArray[np.float32]:
    model = SentenceTransformer(str(folder), device="cpu")
    made: NDArray[np.float32] = model.encode(texts, batch_size=7, show_progress_bar=False, **options)
    return made


def save(folder: Path, family: str, *modules: torch.nn.Module, **options: Any) -> Path:
    """A sentence-transformers folder around the family's tiny model."""
    plain = write_encoder(folder / "plain", family)
    made = SentenceTransformer(modules=[Transformer(str(plain)), *modules], device="cpu", **options)
    made.save_pretrained(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def check(folder: Path, texts: list[str], lane: str | None = None, **options: Any) -> None:
    """Each text alone, and all of them in one step, give their vectors."""
    expected = theirs(folder, texts, **options)
    runner = load(folder)
    assert lane in (None, runner.info.lane)
    assert runner.info.row_size == expected.shape[1]
    inputs = encode_texts(folder, texts)
    scale = np.abs(expected).max()
    for got in (vectors(runner, inputs), np.concatenate([vectors(runner, [each]) for each in inputs])):
        assert np.abs(got - expected).max() <= TOLERANCE * max(1.0, float(scale))


@pytest.mark.parametrize("family", LANES)
def test_every_family_and_its_lane(tmp_path: Path, family: str) -> None:
    mode = "lasttoken" if family == "qwen3" else "mean"
    folder = save(tmp_path, family, Pooling(48, mode), Normalize())
    check(folder, make_texts(), LANES[family])


@pytest.mark.parametrize("family", LANES)
def test_plain_folders(tmp_path: Path, family: str) -> None:
    """Without modules.json the tokens' mean is taken, of a language model's folder the last token."""
    folder = write_encoder(tmp_path / "m", family)
    if family != "qwen3":
        check(folder, make_texts(12), LANES[family])
        return
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    expected = theirs(folder, texts := make_texts(12))
    runner = load(folder, task="embed")
    assert np.abs(vectors(runner, encode_texts(folder, texts)) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("mode", [*MODES, ("cls", "mean", "max"), ("weightedmean", "lasttoken")])
def test_every_pooling(tmp_path: Path, mode: Any) -> None:
    check(save(tmp_path, "bert", Pooling(48, mode)), make_texts(12))


@pytest.mark.parametrize("mode", MODES)
def test_the_older_configuration_of_pooling(tmp_path: Path, mode: str) -> None:
    folder = save(tmp_path, "bert", Pooling(48, "mean"))
    keys = {
        "cls": "cls_token",
        "max": "max_tokens",
        "mean": "mean_tokens",
        "lasttoken": "lasttoken",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "weightedmean": "weightedmean_tokens",
    }
    content: dict[str, Any] = {f"pooling_mode_{key}": name == mode for name, key in keys.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **content}))
    check(folder, make_texts(12))


@pytest.mark.parametrize("mode", MODES)
def test_an_instruction_that_does_not_count(tmp_path: Path, mode: Any) -> None:
    folder = save(tmp_path, "bert", Pooling(48, mode, include_prompt=False), prompts={"query": "ask: "})
    texts = make_texts(12, MAX_LENGTH - 10)
    expected = theirs(folder, texts, prompt_name="query")
    encoded = encode_texts(folder, ["ask: " + text for text in texts])
    inputs = [EncoderInput(each.token_ids, [], len("[") + len("ask: ")) for each in encoded]
    got = vectors(load(folder), inputs)
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
    if mode not in ("cls", "lasttoken"):
        assert np.abs(vectors(load(folder), encoded) - expected).max() > 1e-3, (
            "it does count where it is not told apart"
        )


@pytest.mark.parametrize("mode", MODES)
def test_an_instruction_that_leaves_no_room(tmp_path: Path, mode: Any) -> None:
    """Cut to the longest input there is nothing of the text: the last special token is left to pool."""
    instruction = "ask: " * 40
    folder = save(tmp_path, "bert", Pooling(48, mode, include_prompt=False), prompts={"query": instruction})
    expected = theirs(folder, ["a text"], prompt_name="query")
    (each,) = encode_texts(folder, [instruction + "a text"])
    cut = [*each.token_ids[: MAX_LENGTH - 1], each.token_ids[-1]]
    got = vectors(load(folder), [EncoderInput(cut, [], len(instruction) + 1)])
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    "dense",
    [
        lambda: Dense(48, 16),
        lambda: Dense(48, 16, bias=False, activation_function=torch.nn.Identity()),
        lambda: Dense(48, 48, activation_function=torch.nn.ReLU(), use_residual=True),
        lambda: Dense(48, 20, activation_function=torch.nn.GELU(), use_residual=True),
    ],
)
def test_dense_layers(tmp_path: Path, dense: Any) -> None:
    torch.manual_seed(1)
    check(save(tmp_path, "bert", Pooling(48, "mean"), dense(), Normalize()), make_texts(12))


def test_layer_norm_and_two_dense_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    norm = LayerNorm(48)
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    check(save(tmp_path, "bert", Pooling(48, "mean"), norm, Dense(48, 32), Dense(32, 16), Normalize()), make_texts(12))


def test_weights_in_the_older_format(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", Pooling(48, "mean"), dense := Dense(48, 16))
    (file,) = folder.glob("2_Dense/*.safetensors")
    file.unlink()
    torch.save(dense.state_dict(), folder / "2_Dense" / "pytorch_model.bin")
    check(folder, make_texts(12))


def test_the_transformers_own_folder(tmp_path: Path) -> None:
    saved = save(tmp_path, "bert", Pooling(48, "mean"))
    folder = tmp_path / "old"
    shutil.copytree(saved, folder / "0_Transformer", ignore=shutil.ignore_patterns("1_Pooling", "modules.json"))
    shutil.copytree(saved / "1_Pooling", folder / "1_Pooling")
    modules = json.loads((saved / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    shutil.copy(saved / "config.json", folder)
    runner = load(folder)
    inputs = encode_texts(folder / "0_Transformer", texts := make_texts(12))
    expected = theirs(saved, texts)
    assert np.abs(vectors(runner, inputs) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_windows_shorter_than_the_texts_and_longer(tmp_path: Path) -> None:
    """ModernBERT's half window is 8 here; with 200 no text reaches its end."""
    for window in (4, 16, 200):
        folder = write_encoder(tmp_path / str(window), "modernbert", local_attention=window)
        check(folder, make_texts(16), "packed")


def test_paddings_token_in_a_text(tmp_path: Path) -> None:
    """XLM-RoBERTa counts positions without it, wherever it stands."""
    folder = save(tmp_path, "xlm-roberta", Pooling(48, "mean"))
    check(folder, ["ab[PAD]cd", "[PAD]", "[PAD][PAD]x", "x[PAD]", "plain", "1234567"], "packed")


def test_vectors_that_the_files_want_shorter(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", Pooling(48, "mean"), Normalize(), truncate_dim=20)
    check(folder, texts := make_texts(12))
    assert vectors(load(folder), encode_texts(folder, texts)).shape == (12, 20)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m[1].update(type="sentence_transformers.models.CNN"), "pool no tokens"),
        (lambda m: m.append({"path": "2_X", "type": "sentence_transformers.models.LSTM"}), "LSTM is not served"),
        (lambda m: m.append({"path": "2_X", "type": "custom_code.Dense"}), "custom_code.Dense is not served"),
        (lambda m: m[0].update(type="sentence_transformers.models.StaticEmbedding"), "StaticEmbedding"),
        (lambda m: m.pop(1), "pool no tokens"),
    ],
)
def test_what_would_change_the_vectors_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    folder = save(tmp_path, "bert", Pooling(48, "mean"))
    modules = json.loads((folder / "modules.json").read_text())
    change(modules)
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadFailed, match=reason):
        load(folder)


def test_unknown_poolings_tasks_and_activations_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "bert", Pooling(48, "mean"), Dense(48, 16))
    pooling = folder / "1_Pooling" / "config.json"
    before = pooling.read_text()
    pooling.write_text(json.dumps({"embedding_dimension": 48, "pooling_mode": "median"}))
    with pytest.raises(ModelLoadFailed, match="'median' is not known"):
        load(folder)
    pooling.write_text(before)
    dense = folder / "2_Dense" / "config.json"
    dense.write_text(json.dumps({**json.loads(dense.read_text()), "activation_function": "os.system"}))
    with pytest.raises(ModelLoadFailed, match="os.system is not served"):
        load(folder)
    own = folder / "sentence_bert_config.json"
    content = json.loads(own.read_text())
    for change in ({"method": "get_text_features"}, {"method_output_name": "pooler_output"}):
        text = {**content["modality_config"]["text"], **change}
        own.write_text(json.dumps({**content, "modality_config": {"text": text}}))
        with pytest.raises(ModelLoadFailed, match="get_text_features|pooler_output"):
            load(folder)
    own.write_text(json.dumps({**content, "transformer_task": "fill-mask"}))
    with pytest.raises(ModelLoadFailed, match="'fill-mask' is not served"):
        load(folder)


@pytest.mark.parametrize(("family", "kind"), [("bert", "BertForMaskedLM"), ("mpnet", "MPNetForMaskedLM")])
def test_a_checkpoint_without_a_pooler(tmp_path: Path, family: str, kind: str) -> None:
    """As models come that were made to guess words: what is not there is not used."""
    folder = write_encoder(tmp_path / "m", family)
    getattr(transformers, kind)(CONFIGS[family]).save_pretrained(folder)
    check(folder, make_texts(12))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert")
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelLoadFailed, match="as a BertModel it needs .* lack: encoder.layer.1.output.dense.weight"):
        load(folder)


def test_the_longest_input(tmp_path: Path) -> None:
    folder = save(tmp_path, "xlm-roberta", Pooling(48, "mean"))
    assert load(folder).info.max_model_len == MAX_LENGTH
    assert load(folder, max_model_len=50).info.max_model_len == 50
    assert load(folder, max_model_len=8192).info.max_model_len == MAX_LENGTH, "it is a language model's"
    own = folder / "sentence_bert_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "max_seq_length": 33}))
    assert load(folder).info.max_model_len == 33
    assert load(folder, max_model_len=MAX_LENGTH).info.max_model_len == 33


def test_the_starter_model() -> None:
    """Real weights, English and other texts, up to its 256 tokens."""
    folder = find_source(STARTERS["all-minilm-l6-v2"])
    words = (Path(__file__).parents[3] / "README.md").read_text().split()
    texts = [" ".join(words[start : start + length]) for start, length in zip(range(120), range(1, 121), strict=True)]
    texts += ["naïve café", "東京は日本の首都", "\n", "cat " * 254]
    fitting = [
        text for text, each in zip(texts, encode_texts(folder, texts), strict=True) if len(each.token_ids) <= 256
    ]
    assert len(fitting) > 80
    check(folder, fitting, "packed")


@pytest.mark.slow
def test_a_gguf_file() -> None:
    """The chat starter's, which says nothing of pooling: the mean, scaled to length 1, as llama.cpp has it."""
    file = smollm2_path()
    runner = load(file, task="embed")
    assert (runner.info.architecture, runner.info.lane) == ("LlamaModel", "packed")
    inputs = [EncoderInput(list(range(100, 100 + length))) for length in (1, 7, 30, 7)]
    got = vectors(runner, inputs)
    with torch.inference_mode(), runner.lane.stock_attention():
        for each, vector in zip(inputs, got, strict=True):
            states = runner.lane.model(input_ids=torch.tensor([each.token_ids])).last_hidden_state[0].float()
            expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
            assert np.abs(vector - expected.numpy()).max() <= TOLERANCE
