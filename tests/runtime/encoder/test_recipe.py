from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmserve.config import ModelConfig
from lmserve.errors import ModelLoadFailed
from lmserve.runtime.encoder.recipe import Module, Pooling, Recipe, choose_task, read_recipe
from tests.models.model_files import write_gguf


def folder(path: Path, config: dict[str, Any], **files: Any) -> ModelConfig:
    path.mkdir()
    for name, content in {"config.json": config, **{k.replace("__", "/"): v for k, v in files.items()}}.items():
        file = path / (name if name.endswith(".json") else f"{name}.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return ModelConfig(model=str(path), model_id="m")


TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("Qwen2VLForConditionalGeneration", "generate"),
        ("BertModel", "embed"),
        ("Qwen3Model", "embed"),
        ("ModernBertForMaskedLM", "embed"),
        ("XLMRobertaForSequenceClassification", "score"),
    ],
)
def test_the_task_is_the_architectures(tmp_path: Path, architecture: str, task: str) -> None:
    config = folder(tmp_path / "m", {"architectures": [architecture]})
    assert choose_task(config) == task


def test_the_task_of_sentence_transformers_folders(tmp_path: Path) -> None:
    causal = {"architectures": ["Qwen3ForCausalLM"]}
    assert choose_task(folder(tmp_path / "a", causal, modules=[TRANSFORMER, POOLING])) == "embed"
    scores = {"transformer_task": "sequence-classification"}
    assert choose_task(folder(tmp_path / "b", causal, modules=[TRANSFORMER], sentence_bert_config=scores)) == "score"


def test_a_persons_word_counts(tmp_path: Path) -> None:
    config = folder(tmp_path / "m", {"architectures": ["LlamaForCausalLM"]})
    assert choose_task(ModelConfig(model=config.model, model_id="m", task="embed")) == "embed"


def test_without_any_modules(tmp_path: Path) -> None:
    plain = folder(tmp_path / "a", {"architectures": ["BertModel"]}, tokenizer_config={"model_max_length": 77})
    assert read_recipe(plain, "embed") == Recipe("embed", "", 77, Pooling(("mean",)))
    causal = folder(
        tmp_path / "b", {"architectures": ["LlamaForCausalLM"]}, tokenizer_config={"model_max_length": int(1e30)}
    )
    assert read_recipe(causal, "embed") == Recipe("embed", "", None, Pooling(("lasttoken",)))
    both = folder(tmp_path / "c", {"architectures": ["LlamaForCausalLM"], "is_causal": False})
    assert read_recipe(both, "embed").pooling == Pooling(("mean",))
    said = folder(tmp_path / "d", {"architectures": ["BertModel"]}, **{"1_Pooling__config": {"pooling_mode": "cls"}})
    assert read_recipe(said, "embed").pooling == Pooling(("cls",))


def test_modules_in_their_order(tmp_path: Path) -> None:
    kinds = ["Dense", "Dropout", "LayerNorm", "Normalize"]
    modules = [
        {"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds, 2)
    ]
    config = folder(
        tmp_path / "m",
        {"architectures": ["BertModel"]},
        modules=[TRANSFORMER, POOLING, *modules],
        sentence_bert_config={"max_seq_length": 12},
        **{"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}},
        **{"2_Dense__config": {"in_features": 4}},
    )
    assert read_recipe(config, "embed") == Recipe(
        "embed",
        "",
        12,
        Pooling(("cls", "max")),
        (
            Module("Dense", "2_Dense", {"in_features": 4}),
            *(Module(m["type"].rpartition(".")[2], m["path"], {}) for m in modules[1:]),
        ),
    )


def test_a_module_that_works_on_something_else_is_refused(tmp_path: Path) -> None:
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    config = folder(
        tmp_path / "m",
        {},
        modules=[TRANSFORMER, POOLING, dense],
        **{"2_Dense__config": {"module_input_name": "token_embeddings"}},
    )
    with pytest.raises(ModelLoadFailed, match="works on token_embeddings"):
        read_recipe(config, "embed")


@pytest.mark.parametrize(
    ("number", "mode"), [(None, "mean"), (1, "mean"), (2, "cls"), (3, "lasttoken"), (0, None), (4, None)]
)
def test_gguf_files_say_how_they_pool(tmp_path: Path, number: int | None, mode: str | None) -> None:
    said = {} if number is None else {"qwen3.pooling_type": number}
    file = write_gguf(tmp_path / "m.gguf", "qwen3", said)
    config = ModelConfig(model=str(file), model_id="m", task="embed")
    if mode is None:
        with pytest.raises(ModelLoadFailed, match="pools its tokens in a way"):
            read_recipe(config, "embed")
        return
    assert read_recipe(config, "embed") == Recipe("embed", "", None, Pooling((mode,)), (Module("Normalize", "", {}),))
