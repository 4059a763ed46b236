"""Which way an encoder goes: the first that gives the stock forward's vectors, whatever the model does of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.model_types.embedded import embed
from benchmarks.model_types.tiny import build, tiny_config
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.interface import EncoderInput
from tests.runtime.encoder.tiny_encoders import load, vectors

TEXTS = [EncoderInput(list(range(30, 30 + n))) for n in (23, 19, 9, 1, 21)]


def save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


def make(kind: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config)
    model.train(False)
    return model


@pytest.mark.parametrize(
    ("model_type", "lane", "reason"),
    [
        ("convbert", "single", "padded: vectors differ"),  # its convolution runs over padding
        ("esm", "padded", "packed: vectors differ"),  # it counts the masks of a row
        ("xlm", "padded", ""),  # types that are all 0 are not the same as none
        ("ibert", "padded", ""),  # its positions' table is no nn.Embedding, and begins behind padding's number
        ("yoso", "single", ""),
        ("neomme", "packed", ""),  # its layers have different windows
        ("tapas", "padded", ""),  # it has seven types for each token
        ("funnel", "single", "its own forward fails on a text of 1 token; "),
        ("llama4", "single", "padded: its configuration names no token for padding"),
        ("big_bird", "padded", ""),
    ],
)
def test_what_models_do_of_their_own(model_type: str, lane: str, reason: str) -> None:
    made = embed(build("encoder", model_type))
    assert (made.served, made.lane) == ("exact", lane), made.served_reason
    assert reason in made.served_reason
    assert reason.startswith("its own forward") or "fails on a text" not in made.served_reason


def test_pairs_of_tokens_that_are_pooled_with_padding() -> None:
    """Funnel's, once its configuration names a token for padding."""
    config = tiny_config("encoder", "funnel")
    config.pad_token_id = 0
    made = embed(make(transformers.FunnelModel, config))
    assert (made.served, made.lane) == ("exact", "single"), made.served_reason
    assert "padded: vectors differ" in made.served_reason


def test_a_row_that_is_longer_than_a_text_may_be() -> None:
    """CLIP counts a row's tokens. The comparison's are fewer than 200, a step's are not."""
    config = tiny_config("encoder", "clip_text_model")
    config.max_position_embeddings = 200
    made = embed(make(transformers.CLIPTextModel, config))
    assert (made.served, made.lane) == ("exact", "padded"), made.served_reason
    assert "Sequence length must be less" in made.served_reason


def test_texts_that_change_how_later_ones_are_read(tmp_path: Path) -> None:
    bird = load(save(tmp_path / "bird", build("encoder", "big_bird")))
    assert bird.info.max_model_len == 56
    with pytest.raises(ModelLoadFailed, match="the first text that it reads decides"):
        load(save(tmp_path / "reformer", build("encoder", "reformer")))


def test_rows_of_a_positions_table_that_are_for_no_text(tmp_path: Path) -> None:
    model: Any = build("encoder", "yoso")
    assert model.embeddings.position_embeddings.num_embeddings == 514
    assert load(save(tmp_path / "m", model)).info.max_model_len == 512


def test_of_an_encoder_with_a_decoder_the_encoder(tmp_path: Path) -> None:
    model: Any = make(transformers.T5Model, tiny_config("encoder", "t5"))
    runner = load(save(tmp_path / "t5", model))
    assert (runner.info.architecture, runner.info.lane) == ("T5EncoderModel", "padded")
    for text, got in zip(TEXTS, vectors(runner, TEXTS), strict=True):
        with torch.no_grad():
            states = model.encoder(input_ids=torch.tensor([text.token_ids])).last_hidden_state[0]
        assert np.abs(got - states.mean(0).numpy()).max() < 1e-5


def test_a_cross_encoder_that_sees_padding_goes_one_by_one(tmp_path: Path) -> None:
    config = tiny_config("encoder", "convbert")
    config.num_labels = 3
    model: Any = make(transformers.ConvBertForSequenceClassification, config)
    runner = load(save(tmp_path / "m", model))
    assert (runner.info.task, runner.info.lane) == ("score", "single")
    assert "padded: scores differ" in runner.info.lane_reason
    for text, got in zip(TEXTS, vectors(runner, TEXTS), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text.token_ids])).logits[0]
        assert np.abs(got - logits.numpy()).max() < 1e-5


def test_a_type_that_transformers_makes_no_vectors_of(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="no class that makes vectors of the type emu3_text_model"):
        load(save(tmp_path / "m", build("encoder", "emu3")))
