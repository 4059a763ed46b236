from __future__ import annotations

import inspect
import socket
from pathlib import Path

import pytest

from lmserve.cli.serve import place_starters, serve
from lmserve.config import keys
from lmserve.config_sources import resolve
from lmserve.errors import ConfigError
from tests.cli.running import lmserve


def test_each_key_is_an_option_with_its_default() -> None:
    help_text = " ".join(lmserve("serve", "--help", COLUMNS="200").stdout.split())
    for key in keys().values():
        assert f"{key.flag} " in help_text
        assert " ".join(key.help.split()) in help_text
    assert "[default: 1234]" in help_text
    assert "[default: 32MiB]" in help_text
    assert "--no-prefix-caching" in help_text
    assert list(inspect.signature(serve).parameters) == ["models", *keys()]


def test_options_reach_the_server(tmp_path: Path, tiny_folder: Path) -> None:
    """The taken port is the first thing that a start looks at; a variable and a file reach it as an option does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        file = tmp_path / "server.toml"
        file.write_text(f"port = {port}\n")
        by_option = lmserve("serve", str(tiny_folder), "--port", port)
        by_variable = lmserve("serve", "--model", str(tiny_folder), LMSERVE_PORT=port)
        by_file = lmserve("serve", "--config", str(file), LMSERVE_MODEL=str(tiny_folder))
    for done in (by_option, by_variable, by_file):
        assert done.returncode == 3
        assert done.stderr == f"lmserve: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_positional_models_and_model_options_are_added_up() -> None:
    done = lmserve("serve", "x=some/model", "--model", "x=other/model")
    assert "two models are called 'x'" in done.stderr


def test_a_starter_models_name_becomes_its_folder(tmp_path: Path) -> None:
    made = tmp_path / "models" / "all-MiniLM-L6-v2"
    config = place_starters(resolve({"model": ["all-MiniLM-L6-v2", "some/model"], "cache": str(tmp_path)}, {}))
    assert [model.model for model in config.models] == [str(made), "some/model"]
    assert (made / "config.json").is_file()


def test_a_folder_with_a_starter_models_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "all-minilm-l6-v2").mkdir()
    (tmp_path / "all-minilm-l6-v2" / "config.json").write_text("{}")
    config = place_starters(resolve({"model": ["all-minilm-l6-v2"]}, {}))
    assert config.models[0].model == "all-minilm-l6-v2"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = resolve({"model": ["all-minilm-l6-v2"], "cache": str(tmp_path / "file")}, {})
    with pytest.raises(ConfigError, match="cannot make the starter model"):
        place_starters(config)
