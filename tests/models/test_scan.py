from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, try_to_load_from_cache

from lmserve.models.scan import MAX_DEPTH, hub_cache_folder, scan_hub_cache, scan_models_dir
from tests.models.model_files import repository, touch


def names_in(root: Path) -> list[str]:
    found = scan_models_dir(root)
    assert all(item.path.exists() for item in found)
    return [item.name for item in found]


def test_folders_and_files_are_models(tmp_path: Path) -> None:
    touch(tmp_path, "Org/Model/config.json", "Org/Model/model.safetensors", "LM/Repo/File-Q4_K_M.gguf", "flat.GGUF")
    assert names_in(tmp_path) == ["flat", "LM/Repo/File-Q4_K_M", "Org/Model"]


def test_a_folder_needs_configuration_and_weights(tmp_path: Path) -> None:
    touch(tmp_path, "tokenizer/config.json", "adapter/adapter_model.safetensors", "weights/model.safetensors")
    touch(tmp_path, "old/config.json", "old/pytorch_model.bin.index.json")
    assert names_in(tmp_path) == ["old"]


def test_a_repository_of_gguf_files_has_one_model_in_each(tmp_path: Path) -> None:
    touch(tmp_path, "repo/config.json", "repo/A-Q4_0.gguf", "repo/A-Q8_0.gguf", "repo/mmproj-A-F16.gguf")
    assert names_in(tmp_path) == ["repo/A-Q4_0", "repo/A-Q8_0"]


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    touch(tmp_path, *(f"big-{part:05}-of-00003.gguf" for part in (1, 2, 3)))
    (found,) = scan_models_dir(tmp_path)
    assert (found.name, found.path.name) == ("big", "big-00001-of-00003.gguf")


def test_what_is_inside_a_model_is_no_other(tmp_path: Path) -> None:
    touch(tmp_path, "a/config.json", "a/model.safetensors", "a/0/config.json", "a/0/model.safetensors", "a/x.gguf")
    touch(tmp_path, "pipe/model_index.json", "pipe/text/config.json", "pipe/text/model.safetensors")
    assert names_in(tmp_path) == ["a"]


def test_hidden_and_unprintable_names_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a.gguf", ".b.gguf", "c.gguf", "line\nfeed.gguf")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9.gguf")).touch()
    assert names_in(tmp_path) == ["c"]


def test_the_scan_ends_at_its_depth(tmp_path: Path) -> None:
    deep = [f"{'d/' * depth}m{depth}.gguf" for depth in range(MAX_DEPTH + 1)]
    touch(tmp_path, *deep, "1/2/3/4/config.json", "1/2/3/4/model.safetensors")
    touch(tmp_path, "1/2/3/model/config.json", "1/2/3/model/model.safetensors")
    assert names_in(tmp_path) == ["m0", "d/m1", "d/d/m2", "d/d/d/m3"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/m.gguf")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to("itself")
    (tmp_path / "gone.gguf").symlink_to("nowhere")
    assert names_in(tmp_path) == ["a/m"]


def test_the_folder_itself_can_be_the_model(tmp_path: Path) -> None:
    touch(tmp_path, "Llama/config.json", "Llama/model.safetensors")
    assert names_in(tmp_path / "Llama") == ["Llama"]


def test_a_folder_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    assert scan_models_dir(tmp_path / "nowhere") == []
    assert scan_hub_cache(tmp_path / "nowhere") == []


def test_repositories_with_weights_are_found(tmp_path: Path) -> None:
    repository(tmp_path, "Org/Model-1B", "config.json", "model.safetensors")
    repository(tmp_path, "gpt2", "config.json", "pytorch_model.bin")
    repository(tmp_path, "Org/tokenizer-only", "config.json", "tokenizer.json")
    repository(tmp_path, "Org/just-begun", "config.json", "model.safetensors.index.json", "training_args.bin")
    repository(tmp_path, "Org/no-config", "model.safetensors")
    touch(tmp_path, "datasets--org--data/snapshots/c0/config.json", "version.txt", "models--empty/refs/main")
    assert [(found.name, found.path.name) for found in scan_hub_cache(tmp_path)] == [
        ("Org/Model-1B", "c0"),
        ("gpt2", "c0"),
    ]


def test_gguf_files_of_repositories_are_found(tmp_path: Path) -> None:
    one = repository(tmp_path, "Org/One-GGUF", "README.md", "one-Q4_K_M.gguf", "mmproj-one.gguf")
    parts = ("big-00001-of-00002.gguf", "big-00002-of-00002.gguf")
    many = repository(tmp_path, "Org/Many", "a-Q4.gguf", *parts)
    repository(tmp_path, "Org/Both", "config.json", "model.safetensors", "a.gguf")
    found = {model.name: model for model in scan_hub_cache(tmp_path)}
    assert set(found) == {"Org/One-GGUF", "Org/Many/a-Q4", "Org/Many/big", "Org/Both"}
    assert found["Org/One-GGUF"].path == one / "snapshots/c0/one-Q4_K_M.gguf"
    assert found["Org/Many/big"].hub_location == str(many / "snapshots/c0" / parts[0])
    assert found["Org/Both"].hub_location == "Org/Both"


def test_weights_that_did_not_arrive_are_none(tmp_path: Path) -> None:
    folder = repository(tmp_path, "Org/Model", "config.json", "model.safetensors")
    (folder / "blobs" / "c0-model.safetensors").unlink()
    assert scan_hub_cache(tmp_path) == []


def test_the_main_branch_is_the_revision(tmp_path: Path) -> None:
    repository(tmp_path, "a/b", "config.json", "model.safetensors", commit="old", main="old")
    folder = repository(tmp_path, "a/b", "config.json", "model.safetensors", commit="new", main=None)
    os.utime(folder / "snapshots" / "old", (1, 1))
    assert [found.path.name for found in scan_hub_cache(tmp_path)] == ["old"]


@pytest.mark.parametrize("main", [None, "gone", "", "../snapshots", "\xff"])
def test_without_a_main_branch_it_is_the_newest(tmp_path: Path, main: str | None) -> None:
    repository(tmp_path, "a/b", "config.json", "model.safetensors", commit="new", main=main)
    folder = repository(tmp_path, "a/b", "config.json", "model.safetensors", commit="old", main=main)
    os.utime(folder / "snapshots" / "old", (1, 1))
    assert [found.path.name for found in scan_hub_cache(tmp_path)] == ["new"]


def test_huggingface_hub_finds_the_same(tmp_path: Path) -> None:
    """Its own look into the cache ends at the same files."""
    repository(tmp_path, "Org/Model.v1_x-2", "config.json", "model.safetensors", commit="0" * 40, main="0" * 40)
    repository(tmp_path, "Org/Model.v1_x-2", "config.json", "model.safetensors", commit="1" * 40, main=None)
    repository(tmp_path, "solo", "config.json", "model.safetensors", commit="2" * 40, main="2" * 40)
    ours = {found.name: str(found.path / "config.json") for found in scan_hub_cache(tmp_path)}
    theirs = {repo.repo_id for repo in scan_cache_dir(tmp_path).repos}
    assert ours == {name: try_to_load_from_cache(name, "config.json", cache_dir=tmp_path) for name in theirs}
    assert len(ours) == 2


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OTHER"])
def test_huggingface_hub_looks_in_the_same_folder(tmp_path: Path, variable: str) -> None:
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], variable: str(tmp_path / "$OTHER" / "there")}
    program = "from huggingface_hub.constants import HF_HUB_CACHE\nfrom lmserve.models.scan import hub_cache_folder\n"
    command = [sys.executable, "-c", program + "print(HF_HUB_CACHE)\nprint(hub_cache_folder())"]
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    theirs, ours = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.split()
    assert ours == theirs


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"}, "~/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/older"}, "/older"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub", "HUGGINGFACE_HUB_CACHE": "/older"}, "/hub"),
    ],
)
def test_the_hubs_own_variables_say_where_the_cache_is(environ: dict[str, str], expected: str) -> None:
    assert hub_cache_folder(environ) == Path(expected).expanduser()
