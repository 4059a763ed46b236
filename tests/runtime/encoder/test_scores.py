"""Our scores against sentence-transformers' CrossEncoder, from the same folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer

from lmserve.errors import ModelLoadFailed
from lmserve.runtime.interface import EncoderInput
from tests.runtime.encoder.tiny_encoders import load, make_texts, vectors, write_encoder

TOLERANCE = 1e-5
FAMILIES = ["bert", "xlm-roberta", "modernbert", "distilbert", "mpnet", "qwen3"]


def make_pairs() -> list[tuple[str, str]]:
    texts = make_texts(24, 40)
    return [*zip(texts, reversed(texts), strict=True)]


def encode_pairs(folder: Path, pairs: list[tuple[str, str]]) -> list[EncoderInput]:
    encoded = AutoTokenizer.from_pretrained(folder)(*map(list, zip(*pairs, strict=True)))
    types = encoded.get("token_type_ids", [[]] * len(pairs))
    return [EncoderInput(ids, kinds) for ids, kinds in zip(encoded["input_ids"], types, strict=True)]


def theirs(folder: Path, pairs: list[tuple[str, str]]) -> Any:
    scores = CrossEncoder(str(folder), device="cpu").predict(pairs, batch_size=5, show_progress_bar=False)
    return scores.reshape(len(pairs), -1)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str, num_labels: int) -> None:
    folder = write_encoder(tmp_path / "m", family, num_labels=num_labels)
    pairs = make_pairs()
    expected, inputs = theirs(folder, pairs), encode_pairs(folder, pairs)
    runner = load(folder)
    assert (runner.info.task, runner.info.row_size, runner.info.lane) == ("score", num_labels, "padded")
    for got in (vectors(runner, inputs), np.concatenate([vectors(runner, [each]) for each in inputs])):
        assert np.abs(got - expected).max() <= TOLERANCE
    assert np.ptp(expected[:, 0]) > 1e-3, "pairs differ"


def test_which_text_a_token_belongs_to_counts(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert", num_labels=1)
    inputs, runner = encode_pairs(folder, make_pairs()), load(folder)
    untold = [EncoderInput(each.token_ids) for each in inputs]
    assert np.abs(vectors(runner, inputs) - vectors(runner, untold)).max() > 1e-3


@pytest.mark.parametrize("where", ["sentence_transformers", "older"])
def test_the_activation_of_the_configuration(tmp_path: Path, where: str) -> None:
    folder = write_encoder(tmp_path / "m", "bert", num_labels=1)
    name = "torch.nn.modules.linear.Identity"
    more: dict[str, Any] = {"sentence_transformers": {"activation_fn": name}} if where != "older" else {}
    more |= {"sbert_ce_default_activation_function": name} if where == "older" else {}
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    pairs = make_pairs()
    got = vectors(load(folder), encode_pairs(folder, pairs))
    assert np.abs(got - theirs(folder, pairs)).max() <= TOLERANCE
    assert got.min() < 0 or got.max() > 1, "a sigmoid would not be there"


def test_an_activation_that_is_code_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert", num_labels=1, sentence_transformers={"activation_fn": "os.system"})
    with pytest.raises(ModelLoadFailed, match="os.system"):
        load(folder)


def test_a_model_without_a_head_has_no_scores(tmp_path: Path) -> None:
    """transformers would make a head up."""
    with pytest.raises(ModelLoadFailed, match="BertForSequenceClassification .* lack: classifier"):
        load(write_encoder(tmp_path / "m", "bert"), task="score")


def test_a_folder_as_sentence_transformers_saves_it(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "bert", num_labels=1)
    CrossEncoder(str(folder), device="cpu").save_pretrained(str(tmp_path / "saved"))
    pairs = make_pairs()
    got = vectors(load(tmp_path / "saved"), encode_pairs(folder, pairs))
    assert np.abs(got - theirs(folder, pairs)).max() <= TOLERANCE


def test_a_decoder_that_cannot_tell_padding_scores_one_by_one(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", "qwen3", num_labels=1)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": None}))
    runner = load(folder)
    inputs = encode_pairs(folder, make_pairs())
    together = vectors(runner, inputs)
    assert np.abs(together - np.concatenate([vectors(runner, [each]) for each in inputs])).max() == 0
    with torch.inference_mode():
        first = torch.sigmoid(runner.lane.model(input_ids=torch.tensor([inputs[0].token_ids])).logits)
    assert np.allclose(together[0], first.numpy(), atol=TOLERANCE)
