from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from benchmarks.model_types import baseline, embedded, pictured, served, survey
from benchmarks.model_types.page import render
from benchmarks.model_types.patches import EMBEDDED_NOTES, NOT_BUILT, PATCHES, STARTS, WHY
from benchmarks.model_types.processor_patches import (
    IMAGE_PROCESSOR_CLASSES,
    IMAGE_SETTINGS,
    NO_PROCESSOR,
    PROCESSOR_CLASSES,
    SETTINGS,
)
from benchmarks.model_types.shrink import pick_layers
from benchmarks.model_types.tiny import KINDS, CannotBuild, Kind, build, model_types, tiny_config

TABLE = Path(survey.__file__).with_name("survey.json")
SAMPLE: tuple[tuple[Kind, str, str], ...] = (
    ("causal", "llama", "4 LlamaAttention"),
    ("causal", "gemma4_text", "2 sliding_attention, 2 full_attention"),
    ("causal", "lfm2", "2 conv, 2 full_attention"),
    ("causal", "deepseek_v3", "4 DeepseekV3Attention"),
    ("image-text", "qwen2_vl", "4 full_attention"),
    ("encoder", "modernbert", "2 full_attention, 2 sliding_attention"),
)


def read_table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(("kind", "model_type", "layers"), SAMPLE)
def test_a_sample_agrees_with_itself(kind: Kind, model_type: str, layers: str) -> None:
    record = survey.examine(kind, model_type)
    assert (record.outcome, record.reason, record.layers) == ("right", "", layers)
    assert record.parameters < 1e6
    assert record.reach is not None
    assert record.reach > 0.05, "the model hardly reads its prompt, so that the check sees nothing"


def test_a_model_is_the_same_every_time() -> None:
    first, second = (build("causal", "mistral").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool((value != value.flatten()[0]).any()) for value in first.values())


def test_what_is_told_of_a_model_that_does_not_agree_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Any, prompt: torch.Tensor) -> Any:
        made = real(model, prompt)
        made.sequences[0, -3] = (made.sequences[0, -3] + 1) % 100 + 30
        return made

    real = baseline._generate_cached
    monkeypatch.setattr(baseline, "_generate_cached", generate)
    outcome = baseline.check("causal", build("causal", "llama"))
    assert outcome.outcome == "wrong"
    assert outcome.reason.startswith("token 10 of 12 differs")


def test_a_type_without_a_model_says_why() -> None:
    with pytest.raises(CannotBuild, match="drafts for another model"):
        tiny_config("causal", "gemma4_assistant")
    assert survey.examine("causal", "gemma4_assistant").outcome == "not built"


def test_a_type_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SECONDS", 0.0)
    (record,) = survey.survey([("causal", "llama")])
    assert (record.outcome, record.reason) == ("not built", "not done within 0 s")


def test_the_command_line_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "survey.json"
    assert survey.main(["--kind", "causal", "--types", "gpt2", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["types"]
    assert (record["model_type"], record["outcome"]) == ("gpt2", "right")
    assert capsys.readouterr().out.endswith("causal right: 1\n")
    assert survey.main(["--types", "no-such-type"]) == 2


def test_every_type_is_in_the_table_built_or_with_a_reason() -> None:
    content = read_table()
    if content["transformers"] != transformers.__version__:
        pytest.skip("the table is another transformers'")
    assert {(each["kind"], each["model_type"]) for each in content["types"]} == {
        (kind, name) for kind in KINDS for name in model_types(kind)
    }
    assert not [each for each in content["types"] if each["outcome"] != "right" and not each["reason"]]
    assert not [each for each in content["types"] if each["outcome"] != "not built" and not each["parameters"]]


def test_what_is_said_of_types_is_said_of_ones_that_exist() -> None:
    known = set(CONFIG_MAPPING.keys())
    assert {*PATCHES, *STARTS} <= {*known, "molmo2_adapter", "molmo2_vit", "step3p5"}
    of_images = (PROCESSOR_CLASSES, IMAGE_PROCESSOR_CLASSES, NO_PROCESSOR, IMAGE_SETTINGS, SETTINGS)
    assert {name for table in of_images for name in table} <= {*model_types("image-text")}
    assert {*NOT_BUILT, *WHY} <= {(kind, name) for kind in KINDS for name in model_types(kind)}


def test_of_many_layers_some_of_each_kind_stay() -> None:
    kinds = ["linear", "linear", "linear", "full"] * 6
    assert [kinds[i] for i in pick_layers(24, 4, [kinds], [])] == ["linear", "linear", "full", "full"]
    assert pick_layers(24, 4, [kinds], [[3]]) == [0, 1, 3, 7]
    assert pick_layers(3, 4, [], []) == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "model_type", "wanted", "lane"),
    [
        ("causal", "gemma3_text", "exact", "packed"),
        ("causal", "qwen3_next", "exact", "state"),
        ("causal", "jamba", "exact", "state, whole prompts"),
        ("causal", "bloom", "exact", "serial"),
        ("causal", "recurrent_gemma", "refused", ""),
        ("image-text", "qwen3_5", "exact", "state"),
        ("encoder", "bert", "exact", "packed"),
        ("encoder", "mpnet", "exact", "padded"),
        ("encoder", "fnet", "exact", "single"),
        ("encoder", "reformer", "refused", ""),
    ],
)
def test_a_sample_is_served_as_the_page_says(kind: Kind, model_type: str, wanted: str, lane: str) -> None:
    record = survey.examine(kind, model_type)
    assert (record.served, record.lane) == (wanted, lane)
    [listed] = [each for each in read_table()["types"] if (each["kind"], each["model_type"]) == (kind, model_type)]
    assert (listed["served"], listed["lane"]) == (wanted, lane)


def test_a_wrong_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> list[list[int]]:
        got = real(*arguments)
        got[3][2] = (got[3][2] + 1) % 100 + 30
        return got

    real = served.run
    monkeypatch.setattr(served, "run", run)
    outcome = served.serve(build("causal", "llama"))
    assert (outcome.served, outcome.lane) == ("wrong", "packed")
    assert outcome.served_reason.startswith("prompt of 14, ")
    monkeypatch.setattr(pictured, "run", run)
    seen = pictured.picture("qwen2_vl", build("image-text", "qwen2_vl"))
    assert seen.images == "wrong"
    assert seen.images_reason.startswith("1 pictures, ")


@pytest.mark.parametrize(
    ("model_type", "wanted", "told"),
    [
        ("idefics2", "exact", ""),
        ("qwen3_omni_moe_thinker", "exact", ""),
        ("gemma3", "exact", "the tokens of an image see each other"),
        ("gemma4", "exact", ""),
        ("video_llama_3", "exact", ""),
        ("ernie4_5_vl_moe", "none", "its logits with images differ from the stock ones by "),
        ("mllama", "none", "its way with images is another: AttributeError: MllamaForConditionalGeneration has no "),
        ("mistral4", "none", "its class has no image encoder apart from its language model"),
        ("deepseek_ocr2", "not tried", "the tiny model itself fails: "),
        ("chameleon", "not tried", "the tokens that it makes of a picture need a larger vocabulary"),
    ],
)
def test_a_sample_reads_images_as_the_page_says(model_type: str, wanted: str, told: str) -> None:
    found = pictured.picture(model_type, build("image-text", model_type))
    assert (found.images, found.images_reason[: len(told)]) == (wanted, told)
    [listed] = [
        each for each in read_table()["types"] if (each["kind"], each["model_type"]) == ("image-text", model_type)
    ]
    assert (listed["images"], listed["images_reason"]) == (found.images, found.images_reason)


def test_no_type_reads_images_wrongly() -> None:
    records = [each for each in read_table()["types"] if each["kind"] == "image-text" and each["served"] == "exact"]
    tried = [each for each in records if each["lane"] in ("packed", "state")]
    assert {each["images"] for each in tried} == {"exact", "none", "not tried"}
    assert not [each["model_type"] for each in tried if each["images"] != "exact" and not each["images_reason"]]
    assert not [each["model_type"] for each in records if each not in tried and each["images"]]


def test_a_wrong_vector_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(runner: Any, texts: Any) -> Any:
        got = real(runner, texts)
        got[4] = got[4].copy()
        got[4][7] += 1e-2
        return got

    real = embedded.run
    monkeypatch.setattr(embedded, "run", run)
    outcome = embedded.embed(build("encoder", "bert"))
    assert (outcome.served, outcome.lane) == ("wrong", "packed")
    assert outcome.served_reason.startswith("text of 70 tokens: ")


def test_texts_are_as_long_as_a_model_takes_and_hold_its_special_tokens() -> None:
    model = build("encoder", "esm")
    assert [len(text) for text in embedded.make_texts(model, 20)] == [19, 1, 9, 9, 14, 20]
    assert len(embedded.make_texts(model, 10**6)[-1]) == embedded.LONGEST
    assert embedded.make_texts(model, 20)[0][1:3] == [model.config.pad_token_id, 3]


def test_all_but_a_few_are_served_exactly_and_none_wrongly() -> None:
    for kind in KINDS:
        of_kind = [record for record in read_table()["types"] if record["kind"] == kind]
        right = [record["served"] for record in of_kind if record["outcome"] == "right"]
        assert right.count("exact") >= 0.95 * len(right)
        assert {record["served"] for record in of_kind} <= {"exact", "refused", ""}
        tried = [record for record in of_kind if record["outcome"] in ("right", "wrong")]
        assert not [record["model_type"] for record in tried if not record["served"]]


def test_notes_are_on_types_that_exist() -> None:
    assert set(EMBEDDED_NOTES) <= set(model_types("encoder"))


def test_the_page_is_of_the_survey() -> None:
    page = Path(__file__).parents[2] / "docs/models.md"
    assert page.read_text(encoding="utf-8") == render(read_table())
