from __future__ import annotations

import json

import msgspec

from lmserve.api.schema.manage import Device, InstanceConfig, Quantization
from tests.cli.running import lmserve
from tests.cli.scripted_server import GIB, Script, instance, managed_model, scripted_server
from tests.cli.terminal_program import at_terminal

UNKNOWN: dict[str, object] = {"memory_bytes": 0, "device_memory_bytes": 0, "device": None, "cpu_percent": None}
LONG = "publisher/a-model-with-a-very-long-name-that-no-narrow-terminal-has-the-place-for-instruct-q4_k_m"


def script() -> Script:
    return Script(
        models=[
            managed_model("zeta/embedder", kind="embedding", size_bytes=GIB // 2, params_string="22M"),
            managed_model("acme/chatter", loaded_instances=[instance("chatter")], size_bytes=2 * GIB),
            managed_model(LONG, loaded_instances=[instance("b"), instance("a")]),
            managed_model("acme/broken", quantization=None, size_bytes=None, problem="no config.json"),
        ]
    )


def test_ls_is_two_tables() -> None:
    with scripted_server(script()) as url:
        done = lmserve("ls", "--url", url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line]
    assert lines == [
        "You have 4 models, taking up 3.50 GiB of disk space.",
        "LLM PARAMS ARCH QUANT SIZE CONTEXT",
        "acme/broken 1.5B qwen2 - - 32768 ✗ no config.json",
        "acme/chatter 1.5B qwen2 Q4_K_M 2.00 GiB 32768 ✓ LOADED",
        f"{LONG} 1.5B qwen2 Q4_K_M 1.00 GiB 32768 ✓ LOADED (2)",
        "EMBEDDING PARAMS ARCH QUANT SIZE CONTEXT",
        "zeta/embedder 22M qwen2 Q4_K_M 512.0 MiB 32768",
    ]


def test_ls_of_some() -> None:
    with scripted_server(script()) as url:
        by_name = lmserve("ls", "CHAT", "--json", "--url", url)
        by_kind = lmserve("ls", "--embedding", "--json", "--url", url)
        both_kinds = lmserve("ls", "acme", "--embedding", "--llm", "--json", "--url", url)
        none = lmserve("ls", "chatter", "--embedding", "--url", url)
        none_json = lmserve("ls", "chatter", "--embedding", "--json", "--url", url)
    assert [model["key"] for model in json.loads(by_name.stdout)] == ["acme/chatter"]
    assert [model["key"] for model in json.loads(by_kind.stdout)] == ["zeta/embedder"]
    assert [model["key"] for model in json.loads(both_kinds.stdout)] == ["acme/broken", "acme/chatter"]
    assert (none.stdout, none.stderr) == ("", "No model here is like that. All of them: lmserve ls\n")
    assert json.loads(none_json.stdout) == []


def test_ls_without_any_model() -> None:
    with scripted_server(Script()) as url:
        done = lmserve("ls", "--url", url)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "No models yet. Get one: lmserve get MODEL\n"


def test_ps_says_what_each_does() -> None:
    busy = instance(
        "b-busy", status="generating", num_running=3, num_queued=2, ttl_seconds=3600.0, ttl_left_seconds=None
    )
    idle = instance("c-idle", ttl_seconds=3600.0, ttl_left_seconds=90.0)
    coming = instance(
        "a-coming", state="loading", status="loading", progress=0.42, stage="weights", config=None, **UNKNOWN
    )
    failed = instance("d-failed", state="failed", status="failed", failure="out of memory", **UNKNOWN)
    models = [
        managed_model("x/one", loaded_instances=[idle, busy]),
        managed_model("x/two", loaded_instances=[failed, coming]),
    ]
    with scripted_server(Script(models=models)) as url:
        done = lmserve("ps", "--url", url)
        as_json = lmserve("ps", "--json", "--url", url)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line]
    assert lines == [
        "IDENTIFIER MODEL STATUS SIZE CONTEXT PARALLEL WEIGHTS DEVICE BUSY DEVICE MEMORY LANE TTL",
        "a-coming x/two LOADING 42% (weights) - - - - - - - packed none",
        "b-busy x/one GENERATING (3, 2 queued) 1.00 GiB 4096 8 float32 CPU 42% 9.00 GiB / 16.0 GiB packed 1h / 1h",
        "c-idle x/one IDLE 1.00 GiB 4096 8 float32 CPU 42% 9.00 GiB / 16.0 GiB packed 1m 30s / 1h",
        "d-failed x/two FAILED (out of memory) - 4096 8 float32 CPU - - packed none",
    ]
    listed = json.loads(as_json.stdout)
    assert [(item["id"], item["model"]) for item in listed] == [
        ("a-coming", "x/two"),
        ("b-busy", "x/one"),
        ("c-idle", "x/one"),
        ("d-failed", "x/two"),
    ]
    assert listed[2]["config"]["kv_cache_tokens"] == 65536


def test_ps_has_a_gpus_figures_as_far_as_they_are_known() -> None:
    """Of a GPU it is told how busy all of it is; what the worker takes of the processors is in the JSON only."""
    told = instance("told", device=Device("cuda:0", 80 * GIB, 74 * GIB, 97.2), device_memory_bytes=36 * GIB)
    untold = instance("untold", device=Device("cuda:0", 80 * GIB, None, None), device_memory_bytes=36 * GIB)
    on_gpu = InstanceConfig(4096, 512, 8, 65536, "cuda:0", "bfloat16")
    instances = [msgspec.structs.replace(each, config=on_gpu) for each in (told, untold)]
    models = [managed_model("x/one", loaded_instances=instances)]
    with scripted_server(Script(models=models)) as url:
        done = lmserve("ps", "--url", url)
        as_json = lmserve("ps", "--json", "--url", url)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line]
    assert lines[1:] == [
        "told x/one IDLE 36.0 GiB 4096 8 bfloat16 CUDA:0 97% 74.0 GiB / 80.0 GiB packed none",
        "untold x/one IDLE 36.0 GiB 4096 8 bfloat16 CUDA:0 - - / 80.0 GiB packed none",
    ]
    listed = json.loads(as_json.stdout)
    assert listed[0]["device"] == {
        "name": "cuda:0",
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 74 * GIB,
        "utilization_percent": 97.2,
    }
    assert [(item["device_memory_bytes"], item["cpu_percent"]) for item in listed] == [(36 * GIB, 41.6)] * 2


def test_ps_of_nothing() -> None:
    with scripted_server(Script(models=[managed_model("x/one")])) as url:
        done = lmserve("ps", "--url", url)
        as_json = lmserve("ps", "--json", "--url", url)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "No models are currently loaded. To load one: lmserve load MODEL\n"
    assert json.loads(as_json.stdout) == []


def test_no_name_is_cut_off_on_a_narrow_terminal() -> None:
    with scripted_server(script()) as url, at_terminal("ls", "--url", url, columns=40) as program:
        assert program.end() == 0
    assert LONG in program.text
    assert "…" not in program.text
    assert "\x1b[" in program.screen  # colours, for a person


def test_a_pipe_gets_plain_text() -> None:
    with scripted_server(script()) as url:
        done = lmserve("ls", "--url", url, COLUMNS="40", FORCE_COLOR="1", TERM="xterm-256color")
    assert LONG in done.stdout
    assert "\x1b" not in done.stdout
    assert not any(character in done.stdout for character in "─━│┃…")


def test_names_do_not_drive_the_terminal_nor_the_table() -> None:
    evil = managed_model("x/[bold]\x1b[2J\nname", quantization=Quantization("[/]", None))
    with scripted_server(Script(models=[evil])) as url:
        with at_terminal("ls", "--url", url) as program:
            assert program.end() == 0
        piped = lmserve("ls", "--url", url)
    for shown in (program.text, piped.stdout):
        assert "x/[bold]\\x1b[2J name" in shown
        assert "[/]" in shown
    assert "\x1b[2J" not in program.screen
