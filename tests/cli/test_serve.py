from __future__ import annotations

import inspect
import socket
from pathlib import Path

from lmserve.cli.serve import serve
from lmserve.config import keys
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
