from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmserve.models.starter import STARTERS
from tests.pyproject import PYPROJECT

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]

LOCK = "tests/e2e/node/package-lock.json"
RECORDING_PYTHON = r"""#!/bin/sh
[ "$1" = -c ] || echo "$@" >>"$RECORD"
case "$*" in
"-m venv "*)
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    printf '#!/bin/sh\necho "lmserve $@"\n' >.venv/bin/lmserve
    printf '#!/bin/sh\necho "npm $@" >>"$RECORD"\n' >.venv/bin/npm
    chmod +x .venv/bin/lmserve .venv/bin/npm ;;
"-c "*) [ -z "$IS_OLD" ] ;;
*"pip download"*)
    suite=.venv/share/json-schema-test-suite
    mkdir -p made-1/json/tests/draft2020-12
    tar -czf "$suite/made-1.tar.gz" made-1 ;;
*pip*) [ -z "$PIP_FAILS" ] ;;
esac
"""
"""Stands for a machine's Python: keeps which modules it ran; its virtual environments have what scripts look at."""


class Checkout:
    """A copy of what the scripts need, on a machine whose Python only records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        (folder / LOCK).parent.mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", LOCK):
            shutil.copy(ROOT / name, folder / name)
        self._python = folder / "python3"
        self._python.write_text(RECORDING_PYTHON)
        self._python.chmod(0o755)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """What the script did, and what Python was asked for."""
        record = self.folder / "record"
        record.write_text("")
        done = subprocess.run(
            [self.folder / "scripts" / script, *arguments],
            cwd="/",
            env={**os.environ, "PYTHON": str(self._python), "RECORD": str(record), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, record.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_start_installs_and_serves(checkout: Checkout) -> None:
    done, asked = checkout.run("serve.sh", "a model", "--port", "99")
    assert asked == [
        "-m venv .venv",
        "-m pip install -c constraints.txt -e .",
        "-m pip install -c constraints.txt --no-deps " + " ".join(s.distribution for s in STARTERS.values()),
    ]
    assert done.stdout == "lmserve serve a model --port 99\n"


def test_the_second_start_asks_for_nothing(checkout: Checkout) -> None:
    checkout.run("serve.sh")
    done, asked = checkout.run("serve.sh", "--help")
    assert (asked, done.stdout, done.stderr) == ([], "lmserve serve --help\n", "")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", LOCK])
def test_changed_dependencies_are_installed(checkout: Checkout, name: str) -> None:
    checkout.run("setup.sh")
    with (checkout.folder / name).open("a") as file:
        file.write("# changed\n")
    assert len(checkout.run("setup.sh")[1]) == 3
    assert checkout.run("setup.sh")[1] == []


def test_a_developers_environment_serves_too_but_not_the_other_way(checkout: Checkout) -> None:
    *_, install, _, instructor, torchao, suite, client = checkout.run("setup.sh", "dev")[1]
    assert install == "-m pip install -c constraints.txt -e .[dev]"
    assert instructor == "-m pip install -c constraints.txt --no-deps instructor"
    assert torchao == "-m pip install -c constraints.txt --no-deps --target .venv/torchao torchao"
    assert suite.startswith("-m pip download -q --no-deps --no-binary :all: -c constraints.txt ")
    assert (checkout.folder / ".venv/share/json-schema-test-suite/draft2020-12").is_dir()
    assert client == "npm ci --prefix tests/e2e/node --no-audit --no-fund"
    assert checkout.run("setup.sh")[1] == []
    shutil.rmtree(checkout.folder / ".venv")
    checkout.run("setup.sh")
    assert "-m pip install -c constraints.txt -e .[dev]" in checkout.run("setup.sh", "dev")[1]


def test_an_old_python_is_refused_in_one_line(checkout: Checkout) -> None:
    done, asked = checkout.run("serve.sh", IS_OLD="yes")
    assert (done.returncode, done.stdout, asked) == (3, "", [])
    assert re.fullmatch(r"lmserve needs Python 3\.10 or later, and /\S+/python3 is not: .*\n", done.stderr)
    done, _ = checkout.run("serve.sh", PYTHON="/not/there")
    assert "/not/there is not" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(("version", "code"), [((3, 9, 18), 1), ((3, 10, 0), 0), ((4, 0, 0), 0)])
def test_which_python_is_old(version: tuple[int, int, int], code: int) -> None:
    """The expression that setup.sh asks Python, on versions that are not at hand."""
    (expression,) = re.findall(r"sys\.exit\((.*?)\)' ", (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8"))
    assert int(eval(expression, {"sys": type("sys", (), {"version_info": version})})) == code


def test_a_failed_installation_is_tried_again(checkout: Checkout) -> None:
    done, _ = checkout.run("serve.sh", PIP_FAILS="yes")
    assert done.returncode != 0
    assert done.stdout == ""
    done, asked = checkout.run("serve.sh")
    assert len(asked) == 3
    assert done.stdout == "lmserve serve\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_say_what_they_do(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] in ("#!/bin/sh", "#!/bin/sh -e")
    assert lines[1].startswith("# ")
    assert {"set -eu", "#!/bin/sh -e"} & set(lines)
    assert len(lines) <= 25
    assert os.access(path, os.X_OK)


def test_scripts_pass_the_linter() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_ci_runs_the_readmes_test_command() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-1] == "exec scripts/test.sh"
    assert "scripts/test.sh" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned_once() -> None:
    pins = [
        re.fullmatch(r"([a-z0-9-]+)==\S+( ; .+)?", line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    names = [pin[1] for pin in pins if pin]
    assert len(names) == len(pins) == len(set(names))
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [*PYPROJECT["project"]["dependencies"], *extras["dev"], *extras["conformance"]]
    wanted += [starter.distribution for starter in STARTERS.values()]
    bare = {re.split(r"[<>=\[; ]", line)[0].lower() for line in wanted}
    assert bare - set(names) <= {"tomli", "lmserve"}  # tomli is for Python 3.10 only


def test_the_wheel_has_the_configuration_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    shipped = tmp_path / "unpacked" / "lmserve" / "configs"
    assert (shipped / "server.example.toml").read_text() == (ROOT / "configs" / "server.example.toml").read_text()
    presets = {path.name for path in (ROOT / "configs" / "presets").glob("*.toml")}
    assert {path.name for path in (shipped / "presets").glob("*.toml")} == presets
    assert (tmp_path / "unpacked" / "lmserve" / "py.typed").exists()
    program = "from lmserve.config_sources import configs_folder as c; print(c())"
    command = [sys.executable, "-c", program]
    where = subprocess.run(command, cwd=shipped.parent.parent, check=True, capture_output=True, text=True)
    assert where.stdout.strip() == str(shipped)


def test_the_node_clients_lock_names_no_registry() -> None:
    assert "://" not in (ROOT / LOCK).read_text(encoding="utf-8")
