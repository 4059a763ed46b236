from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmserve.config import Config, keys
from lmserve.config_sources import Preset, Setting, configs_folder, load_presets, render_example, resolve
from lmserve.errors import ConfigError

MODEL = {"model": ["some/model"]}


def resolve_flags(**flags: Any) -> Config:
    return resolve({**MODEL, **flags}, {})


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def model_folder(path: Path, model_type: str = "llama") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_nothing_given_is_the_starter_model_on_this_machine_only() -> None:
    config = resolve({}, {})
    assert (config.host, config.port) == ("127.0.0.1", 1234)
    assert [(m.model, m.model_id) for m in config.models] == [("smollm2-135m-instruct", "smollm2-135m-instruct")]


def test_flags_before_variables_before_the_file_before_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'port = 1\nmax_num_seqs = 1\nblock_size = 1\nkv_cache_memory = "1MiB"')
    environ = {"LMSERVE_PORT": "2", "LMSERVE_MAX_NUM_SEQS": "2", "PATH": "/bin"}
    config = resolve({**MODEL, "config": file, "port": "3", "max_num_seqs": None}, environ)
    model = config.models[0]
    assert (config.port, model.max_num_seqs, model.block_size, model.max_waiting) == (3, 2, 1, 1024)
    assert model.kv_cache_memory == 2**20


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'model = "some/model"\nprefix_caching = false')
    assert resolve({}, {"LMSERVE_CONFIG": file}).models[0].prefix_caching is False


def test_lists_in_variables_have_commas_and_empty_variables_are_not_set() -> None:
    config = resolve(MODEL, {"LMSERVE_API_KEY": "a, b", "LMSERVE_PORT": "", "LMSERVE_CORS_ORIGINS": " "})
    assert config.api_key == ("a", "b")
    assert config.port == 1234
    assert config.cors_origins == ()


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({"prot": "1"}, {}, "flag --prot: there is no key 'prot'; did you mean port?"),
        ({}, {"LMSERVE_MAX_NUM_SEQ": "1"}, "variable LMSERVE_MAX_NUM_SEQ: there is no key 'max_num_seq'; did you mean"),
        ({"port": "x"}, {}, r"port (flag --port) must be a whole number in [0, 65535], got 'x'"),
        ({}, {"LMSERVE_DEVICE": "tpu"}, "device (variable LMSERVE_DEVICE) must be one of auto, cuda, mps, cpu, got"),
        ({"model": ["./nowhere"]}, {}, "./nowhere: there is no such folder or file"),
        ({"model": ["a/b/c"]}, {}, "a/b/c: there is no such folder or file"),
        ({"model": ["nowhere.gguf"]}, {}, "nowhere.gguf: there is no such folder or file"),
        ({"model": ["a b=c"]}, {}, "NAME=MODEL"),
        ({"model": ["x=a/b", "x=c/d"]}, {}, "two models are called 'x'"),
        (
            {"model": ["a/Name", "b/name"]},
            {},
            "two models are called 'name'; give one of them another name: NAME=b/name",
        ),
        ({"preset": "smolm2"}, {}, "did you mean smollm2?"),
        ({"ssl_keyfile": "key.pem"}, {}, "ssl_keyfile needs ssl_certfile"),
        ({"ssl_certfile": "nowhere.pem"}, {}, "ssl_certfile: cannot read nowhere.pem"),
        ({"config": "nowhere.toml"}, {}, "cannot read nowhere.toml"),
    ],
)
def test_mistakes_are_named_with_their_source(flags: dict[str, Any], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve({**MODEL, **flags}, environ)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "there is no key 'prot'; did you mean port?"),
        ("port = 99999", "must be a whole number in [0, 65535], got 99999"),
        ('config = "b.toml"', "config cannot stand in a configuration file"),
        ("model = []", "model: the list is empty"),
        ("port = ", "a.toml: "),
        ("[server]\nport = 1", "there is no key 'server'"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve({"config": write(tmp_path / "a.toml", text)}, {})
    assert says in str(raised.value)
    assert "a.toml" in str(raised.value) or "list is empty" in str(raised.value)


def test_a_bad_secret_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_flags(api_key=["hunter2", 5])
    assert "hunter2" not in str(raised.value)


def test_names_of_models(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "My-Model")
    gguf = tmp_path / "small.Q4.gguf"
    gguf.touch()
    models = resolve({"model": [str(folder), str(gguf), "org/name", f"alias={folder}"]}, {}).models
    assert [m.model_id for m in models] == ["my-model", "small.q4", "name", "alias"]
    assert models[3].model == models[0].model == str(folder)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "lr=0.1")
    assert resolve({"model": [str(folder)]}, {}).models[0].model == str(folder)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "m")
    config = resolve({"model": ["~/m", "other=~/m"], "cache": "~/c"}, {})
    assert [m.model for m in config.models] == [str(tmp_path / "m")] * 2
    assert config.cache == str(tmp_path / "c")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve({"model": [str(tmp_path)]}, {})
    with pytest.raises(ConfigError, match="a model is a folder"):
        resolve({"model": [write(tmp_path / "model.safetensors", "")]}, {})


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("smollm2-135m-instruct", "smollm2"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2"),
        ("HuggingFaceTB/SmolLM2-1.7B", None),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3"),
        ("HuggingFaceTB/SmolLM3-3B-Base", None),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3"),
        ("meta-llama/Llama-3.2-1B", None),
        ("NousResearch/Hermes-3-Llama-3.1-8B", None),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "qwen2.5"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3"),
        ("Qwen/Qwen3-8B-Base", None),
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "qwen3-instruct"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", None),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral-small"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("google/gemma-3-1b-it", "gemma3"),
        ("google/gemma-3-1b-pt", None),
        ("google/gemma-3n-E2B-it", "gemma3"),
        ("microsoft/Phi-4-reasoning-plus", "phi4-reasoning"),
        ("microsoft/phi-4", None),
        ("openai/gpt-oss-20b", "gpt-oss"),
        ("allenai/Olmo-3-7B-Think", "olmo3-think"),
    ],
)
def test_presets_are_found_by_name(model: str, preset: str | None) -> None:
    config = resolve({"model": [model]}, {})
    chosen = resolve({"model": [model], "preset": preset or "none"}, {})
    assert config.setup("x", model).sampling == chosen.setup("x", model).sampling
    assert bool(config.setup("x", model).sampling) == (preset is not None)


def test_presets_are_found_by_model_type(tmp_path: Path) -> None:
    folder = str(model_folder(tmp_path / "my-own", "gpt_oss"))
    config = resolve({"model": [folder]}, {})
    assert config.setup("my-own", folder).sampling == {"temperature": 1.0, "top_p": 1.0}


def test_a_presets_values_stay_below_the_checkpoints_and_keep_their_names() -> None:
    presets = [
        Preset("a", ("some/*",), {"default_repeat_penalty": Setting(1.1, "a"), "block_size": Setting(32, "a")}),
        Preset("b", ("some/mod*",), {"default_repeat_penalty": Setting(1.2, "b"), "block_size": Setting(64, "b")}),
    ]
    config = resolve(MODEL, {}, presets)
    assert config.default_repeat_penalty is None
    assert config.setup("model", "some/model").sampling == {"repetition_penalty": 1.2}
    assert config.models[0].block_size == 64
    assert resolve({**MODEL, "preset": "a"}, {}, presets).models[0].block_size == 32
    assert resolve({**MODEL, "preset": "none"}, {}, presets).models[0].block_size == 16
    assert resolve(MODEL, {"LMSERVE_BLOCK_SIZE": "8"}, presets).models[0].block_size == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("default_temperature = 1", "must have model"),
        ('port = 1\n[match]\nmodel = ["*"]', "port is the server's"),
        ('default_temperature = 9\n[match]\nmodel = ["*"]', "must be a number in [0, 2]"),
        ('temperature = 1\n[match]\nmodel = ["*"]', "did you mean default_temperature?"),
    ],
)
def test_mistakes_in_presets(tmp_path: Path, text: str, says: str) -> None:
    write(tmp_path / "mine.toml", text)
    with pytest.raises(ConfigError) as raised:
        load_presets(tmp_path)
    assert says in str(raised.value)
    assert "preset mine" in str(raised.value)


def test_every_preset_says_where_its_values_are_from() -> None:
    files = sorted((configs_folder() / "presets").glob("*.toml"))
    assert [preset.name for preset in load_presets(configs_folder() / "presets")] == [file.stem for file in files]
    assert len(files) >= 10
    for file in files:
        assert file.read_text(encoding="utf-8").startswith("# ")


def test_the_example_file_is_fresh() -> None:
    """If not: ``python -m lmserve.config_sources > configs/server.example.toml``."""
    assert (configs_folder() / "server.example.toml").read_text(encoding="utf-8") == render_example()


def test_the_example_file_has_every_key_and_its_default(tmp_path: Path) -> None:
    lines = [line[1:] for line in render_example().splitlines() if line.startswith("#") and line[1:2].isalpha()]
    assert [line.split(" = ")[0] for line in lines] == [name for name in keys() if name != "config"]
    set_lines = [line for line in lines if keys()[line.split(" = ")[0]].default is not None]
    config = resolve({"config": write(tmp_path / "all.toml", "\n".join(set_lines))}, {})
    plain = resolve({}, {})
    assert config.models == plain.models
    assert all(
        getattr(config, name) == getattr(plain, name) for name in keys() if name != "config" and hasattr(plain, name)
    )
    resolve({"config": write(tmp_path / "examples.toml", "\n".join(lines))}, {})
