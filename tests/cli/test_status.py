from __future__ import annotations

import json

import pytest

from tests.cli.running import lmserve
from tests.cli.scripted_server import Script, instance, managed_model, scripted_server

COMING = instance("b", state="loading", status="loading", device_memory_bytes=2**29)


def test_on() -> None:
    script = Script(models=[managed_model("x/one", loaded_instances=[COMING, instance("a")])])
    with scripted_server(script) as url:
        done = lmserve("status", "--url", url)
        as_json = lmserve("status", "--json", "--url", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"Server: ON ({url})\nVersion: 9.8.7\nHealth: ok\n\n"
        "Loaded models\n  · a - 1.00 GiB\n  · b - 512.0 MiB, loading\n"
    )
    facts = json.loads(as_json.stdout)
    assert (facts["running"], facts["url"], facts["version"], facts["healthy"]) == (True, url, "9.8.7", True)
    assert [item["id"] for item in facts["models"]] == ["a", "b"]


def test_on_and_not_well() -> None:
    with scripted_server(Script(problem="the server is stopping")) as url:
        done = lmserve("status", "--url", url)
        as_json = lmserve("status", "--json", "--url", url)
    assert done.returncode == 0
    assert "Health: unavailable (the server is stopping)\n\nNo models are loaded.\n" in done.stdout
    assert json.loads(as_json.stdout)["reason"] == "the server is stopping"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_off(arguments: list[str]) -> None:
    done = lmserve("status", "--url", "http://127.0.0.1:1", *arguments)
    assert (done.returncode, done.stderr) == (1, "")
    if arguments:
        assert json.loads(done.stdout) == {"running": False, "url": "http://127.0.0.1:1"}
    else:
        assert done.stdout == "Server: OFF\n"


def test_a_server_that_asks_for_a_key_is_on() -> None:
    with scripted_server(Script(key="secret")) as url:
        without = lmserve("status", "--url", url)
        by_option = lmserve("status", "--url", url, "--api-key", "secret")
        by_variable = lmserve("status", "--url", url, LMSERVE_API_KEY=" secret , other")
    assert (without.returncode, without.stdout) == (1, "")
    assert without.stderr == "lmserve: Missing or wrong API key. Give one with --api-key or LMSERVE_API_KEY.\n"
    assert by_option.returncode == by_variable.returncode == 0
