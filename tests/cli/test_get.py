from __future__ import annotations

import json

import pytest

from tests.cli.running import lmserve
from tests.cli.scripted_server import GIB, Script, download, scripted_server
from tests.cli.terminal_program import CTRL_C, at_terminal

PATH = "/api/v1/models/download"


def test_a_download_without_a_terminal_is_a_line_for_each_tenth() -> None:
    jobs = [
        download("downloading", 0, total_size_bytes=0),
        download("downloading", GIB // 4),
        download("downloading", GIB // 4 + 1),
        download("completed", GIB, path="/models/Some/Model"),
    ]
    script = Script(downloads=jobs)
    with scripted_server(script) as url:
        done = lmserve("get", "Some/Model", "--revision", "v2", "--quantization", "Q4_K_M", "--url", url)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        "Downloading Some/Model\nDownloading Some/Model: 20% of 1.00 GiB\n"
        "Some/Model is here in /models/Some/Model (1.00 GiB).\nLoad it with: lmserve load model\n"
    )
    assert script.bodies(PATH) == [{"model": "Some/Model", "revision": "v2", "quantization": "Q4_K_M"}]


@pytest.mark.parametrize("columns", [120, 80])
def test_a_download_at_a_terminal_is_a_bar(columns: int) -> None:
    script = Script(downloads=[download("downloading", GIB // 2)])
    with scripted_server(script) as url, at_terminal("get", "Some/Model", "--url", url, columns=columns) as program:
        program.until("Downloading Some/Model")
        program.until("0.5/1.0 GiB 4.77 MiB/s, 1m 47s left")
        assert "━" in program.text
        script.downloads = [download("completed", GIB)]
        program.until("Some/Model is here (1.00 GiB).")
        assert program.end() == 0


def test_ctrl_c_cancels_the_job() -> None:
    script = Script(downloads=[download("downloading", 1)])
    with scripted_server(script) as url, at_terminal("get", "Some/Model", "--url", url) as program:
        program.until("Downloading Some/Model")
        program.type(CTRL_C)
        program.until("Download cancelled.")
        assert program.end() == 130
    assert f"{PATH}/cancel/job-1" in [path for _, path, _ in script.asked]
    assert "Traceback" not in program.text


def test_what_is_already_there() -> None:
    with scripted_server(Script(downloads=[download("already_downloaded", GIB, path="/models/x")])) as url:
        done = lmserve("get", "Some/Model", "--json", "--url", url)
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "already_downloaded"
    assert done.stderr.startswith("Some/Model is already here in /models/x.\n")


def test_a_download_that_fails() -> None:
    jobs = [download("downloading", 1), download("failed", 1, error="the disk is full")]
    with scripted_server(Script(downloads=jobs)) as url:
        failed = lmserve("get", "Some/Model", "--url", url)
    with scripted_server(Script(downloads=[download("cancelled", 1)])) as url:
        cancelled = lmserve("get", "Some/Model", "--json", "--url", url)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.endswith("lmserve: the download of Some/Model ended: the disk is full\n")
    assert (cancelled.returncode, cancelled.stdout) == (1, "")
    assert "somebody cancelled it" in cancelled.stderr
