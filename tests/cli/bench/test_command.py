"""The command against a real server with a tiny model, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmserve.cli.bench.load import Target
from lmserve.cli.bench.process import Server, free_port, lmserve_command
from lmserve.cli.bench.prompts import PromptMaker, count_tokens, words
from lmserve.cli.bench.results import read_results
from lmserve.cli.bench.scenarios import SCENARIOS


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmserve", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


SMALL = ("--quick", "--prompt-tokens", "48", "--requests", "3")


def test_prompts_have_their_length_and_share_no_beginning(tiny_folder: Path) -> None:
    port = free_port()
    with Server(lmserve_command(str(tiny_folder), port, ["--max-model-len", "2048"]), port) as server:
        target = Target(server.base_url, "tiny")
        prompts = PromptMaker.ask(target)
        for wanted in (48, 200):
            counts = [count_tokens(target, prompts.user(wanted, f"{i}.x")[0]["content"]) for i in range(4)]
            assert all(abs(count - wanted) <= wanted * 0.2 for count in counts)
        system, user = prompts.shared(100, 48, "1.x")
        assert prompts.shared(100, 48, "2.x")[0] == system
        assert user == prompts.user(48, "1.x")[0]
    assert words(5, "a").split()[0] == "a"
    assert words(5, "a") == words(5, "a") != words(5, "b")


@pytest.mark.slow
def test_a_run_of_a_server_that_it_starts(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    scenarios = [argument for name in ("s1", "shared", "mixed") for argument in ("--scenario", name)]
    done = bench(
        *("--serve", str(tiny_folder), "--options", "--max-model-len 2048", "--output", str(file), "--json"),
        *(*SMALL, *scenarios),
    )
    assert done.returncode == 0, done.stderr
    results = read_results(file)
    assert json.loads(done.stdout)["contender"] == results.contender == "lmserve"
    assert [each.name for each in results.scenarios] == ["s1", "shared", "mixed"]
    assert results.ready_seconds is not None
    assert results.memory_bytes is not None
    s1, _, mixed = (each.rounds[0] for each in results.scenarios)
    assert s1.num_requests == 1, "as many as streams, with --quick"
    assert s1.mean_completion_tokens == 16.0
    assert mixed.long_prompt_seconds is not None
    shown = bench("show", str(file), str(file), "--markdown")
    assert "| s1 | lmserve |" in shown.stdout
    compared = bench("compare", str(file), str(file), "--fail-below", "0.99")
    assert compared.returncode == 0, compared.stderr
    assert "within spread" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "s9"), "no scenario"),
        (("--url", "http://127.0.0.1:9", "--serve", "m"), "exclude each other"),
        (("--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("--url", "unix:/tmp/x.sock"), "needs a server with a port"),
        (("--command", "serve"), "{port}"),
        (("--command", f"{sys.executable} -c 'raise SystemExit(4)' {{port}}"), "code 4"),
        (("compare", "nowhere.json", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_scenarios_describe_themselves() -> None:
    assert SCENARIOS["s1"].description == "1 stream, 128 → 128 tokens, 6 requests"
    assert SCENARIOS["shared"].description.startswith("4 streams, 1024 shared + 32 → 32 tokens")
    assert SCENARIOS["mixed"].description.endswith("beside a prompt of 6000")
