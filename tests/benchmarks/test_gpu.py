"""The GPU benchmark: its arithmetic, its aims, its models, and that nothing which fails costs more than itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu.aims import AIMS, Aim, Verdict, judge
from benchmarks.gpu.limits import limits_of
from benchmarks.gpu.report import figure, section_lines
from benchmarks.gpu.results import Row, Section, attempt, line_of, rows_of
from benchmarks.gpu.roofline import ModelSize, Work, causal_pairs, decode_step, prefill
from benchmarks.gpu.run_section import run_section
from benchmarks.gpu.sections import JOBS, LIMITS, MODULES, Job, chosen, runner_of
from benchmarks.gpu.setting import Limits, Setting
from benchmarks.gpu.shapes import make_model, model_names, read_config, size_of

ROOT = Path(__file__).parents[2]
H200 = Limits(4.3e12, 790e12)
META = torch.device("meta")
NUM_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-30b-a3b": 30_532_122_624,
}
TOY = ModelSize(num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, body=1000, head=100)
EXPERTS = replace(TOY, expert=50, num_experts=4, experts_per_token=2)


@pytest.fixture(scope="module")
def sizes() -> dict[str, ModelSize]:
    return {name: size_of(make_model(name, META, torch.bfloat16)) for name in model_names()}


def test_configurations_have_the_known_numbers_of_parameters() -> None:
    assert set(model_names()) == set(NUM_PARAMETERS)
    for name, expected in NUM_PARAMETERS.items():
        model = make_model(name, META, torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == expected, name
        assert model.dtype == torch.bfloat16


def test_sizes_by_hand(sizes: dict[str, ModelSize]) -> None:
    vocabulary = 151_936
    small, large, mixed = sizes["qwen3-0.6b"], sizes["qwen3-8b"], sizes["qwen3-30b-a3b"]
    assert (small.head, small.body) == (vocabulary * 1024, 596_049_920 - vocabulary * 1024)  # tied
    assert (large.head, large.body) == (vocabulary * 4096, 8_190_735_360 - 2 * vocabulary * 4096)
    assert small.kv_bytes_per_token == 112 * 1024
    assert large.kv_bytes_per_token == 144 * 1024
    assert sizes["llama-3.1-8b"].kv_bytes_per_token == 128 * 1024
    assert mixed.expert == 48 * 3 * 2048 * 768
    assert (mixed.num_experts, mixed.experts_per_token) == (128, 8)
    assert mixed.body == 30_532_122_624 - 128 * mixed.expert - 2 * vocabulary * 2048
    assert mixed.weights_per_token + 2 * mixed.head == pytest.approx(3.35e9, rel=0.01)  # "A3B"


@pytest.mark.parametrize(
    ("model", "rows", "milliseconds", "tokens_per_second"),
    [
        ("qwen3-0.6b", 1, 0.305, 3284),
        ("qwen3-0.6b", 256, 7.27, 35_200),
        ("qwen3-1.7b", 32, 1.67, 19_100),
        ("qwen3-8b", 1, 3.56, 281),
        ("qwen3-8b", 32, 4.64, 6890),
        ("qwen3-8b", 256, 12.5, 20_460),
        ("llama-3.1-8b", 32, 4.49, 7130),
    ],
)
def test_decode_rooflines_of_an_h200(
    sizes: dict[str, ModelSize], model: str, rows: int, milliseconds: float, tokens_per_second: float
) -> None:
    took = decode_step(sizes[model], rows, 1024).seconds(H200)
    assert took is not None
    assert 1e3 * took == pytest.approx(milliseconds, rel=0.01)
    assert rows / took == pytest.approx(tokens_per_second, rel=0.01)


@pytest.mark.parametrize(("length", "tokens_per_second"), [(1024, 55_700), (8192, 48_400)])
def test_prefill_rooflines_of_an_h200(sizes: dict[str, ModelSize], length: int, tokens_per_second: float) -> None:
    took = prefill(sizes["qwen3-8b"], length).seconds(H200)
    assert took is not None
    assert length / took == pytest.approx(tokens_per_second, rel=0.01)


def test_work_by_hand() -> None:
    assert (TOY.kv_bytes_per_token, TOY.flops_per_pair) == (2 * 2 * 2 * 8 * 2, 4 * 2 * 4 * 8)
    assert decode_step(TOY, 3, 10) == Work(1100 * 2 + 3 * 10 * 128, 3 * (2 * 1100 + 10 * 256))
    assert causal_pairs(4, 2) == 3 + 4 + 5 + 6
    assert prefill(TOY, 4, 2) == Work(1100 * 2 + 6 * 128, 4 * 2 * 1000 + 2 * 100 + 18 * 256)


def test_experts_by_hand() -> None:
    assert TOY.experts_read(5) == 0
    assert [EXPERTS.experts_read(rows) for rows in (1, 2, 3)] == [2, 3, 3.5]
    assert decode_step(EXPERTS, 2, 10) == Work((1100 + 3 * 50) * 2 + 2 * 10 * 128, 2 * (2 * 1200 + 10 * 256))
    assert prefill(EXPERTS, 1).flops == 2 * 1100 + 2 * 100 + 256


def test_the_slower_of_memory_and_products_decides() -> None:
    assert Work(10, 40).seconds(Limits(5, 40)) == 2
    assert Work(10, 40).seconds(Limits(5, 10)) == 4
    assert Work(10, 40).seconds(Limits()) is None


def test_limits_come_from_the_rows_of_their_section() -> None:
    rows = [
        Row("copy bandwidth", 4300.0, "GB/s"),
        Row("product of 4096 x 4096", 1.0, ""),
        Row("product rate", 790.0, ""),
    ]
    assert limits_of(rows) == H200
    assert not limits_of(rows[:2]).known
    assert not limits_of([]).known


def test_a_share_is_of_what_is_possible() -> None:
    assert Row.of_rate("", 50.0, "", 200.0).share == 0.25
    assert Row.of_time("", 8.0, "ms", 2.0).share == 0.25
    assert Row.of_rate("", 50.0, "", None).share is None
    assert Row.of_time("", 8.0, "ms", None).share is None


def verdict(aim: Aim, *sections: Section, device: str = "NVIDIA H200") -> Verdict:
    [found] = judge(sections, device, [aim])
    return found


def test_an_aim_is_met_missed_or_not_measured() -> None:
    def found(least: float | None, most: float | None, value: float | None) -> str:
        section = Section("s", "m", rows=[Row("r", value, "")])
        return verdict(Aim(what="", section="s", model="m", row="r", least=least, most=most), section).outcome

    assert [found(2.0, None, value) for value in (1.9, 2.0, 3.0, None)] == ["missed", "met", "met", "not measured"]
    assert [found(None, 2.0, value) for value in (1.9, 2.0, 3.0, None)] == ["met", "met", "missed", "not measured"]


def test_an_aim_looks_at_its_own_section_model_and_row() -> None:
    aim = Aim(what="", section="s", model="m", row="r", least=1.0)
    others = (Section("t", "m", rows=[Row("r", 5.0, "")]), Section("s", "n", rows=[Row("r", 5.0, "")]))
    assert verdict(aim, *others).outcome == "not measured"
    assert verdict(aim, *others, Section("s", "m", rows=[Row("rr", 5.0, "")])).outcome == "not measured"
    assert verdict(aim, *others, Section("s", "m", rows=[Row("r", 5.0, "")])).value == 5.0


def test_an_aim_of_a_share_needs_one() -> None:
    aim = Aim(what="", section="s", row="r", of="share", least=0.75)
    assert verdict(aim, Section("s", rows=[Row("r", 90.0, "", 100.0, 0.9)])).value == 0.9
    assert verdict(aim, Section("s", rows=[Row("r", 90.0, "")])).outcome == "not measured"


def test_an_aim_of_many_rows_takes_the_worst() -> None:
    aim = Aim(what="", section="s", row="error, *", of="limit", most=1.0)
    rows = [Row("error, a", 1.0, "", 4.0), Row("error, b", 3.0, "", 4.0), Row("other", 9.0, "", 4.0)]
    assert verdict(aim, Section("s", rows=rows)) == Verdict("", "met", 0.75)
    assert verdict(aim, Section("s", rows=[*rows, Row("error, c", 5.0, "", 4.0)])).outcome == "missed"
    stopped = Section("s", status="stopped", reason="no time", rows=rows)
    assert verdict(aim, stopped) == Verdict("", "not measured", reason="not all of it: no time")
    stopped.rows.append(Row("error, c", 5.0, "", 4.0))
    assert verdict(aim, stopped).outcome == "missed"
    each = Section("s", rows=[Row("same, a", 1.0, ""), Row("same, b", 0.0, "")])
    assert verdict(Aim(what="", section="s", row="same, *", least=1.0), each) == Verdict("", "missed", 0.0)


def test_what_failed_is_missed() -> None:
    aim = Aim(what="", section="s", row="error, *", most=1.0)
    failed = Row("error, b", None, "", note="failed: no", failed=True)
    assert verdict(aim, Section("s", rows=[Row("error, a", 0.5, ""), failed])).outcome == "missed"


def test_an_aim_over_another_section() -> None:
    aim = Aim(what="", section="s", model="m", row="r", over=("peers", "p"), least=3.0)
    ours = Section("s", "m", rows=[Row("r", 30.0, "")])
    assert verdict(aim, ours, Section("peers", "m", rows=[Row("p", 10.0, "")])) == Verdict("", "met", 3.0)
    assert verdict(aim, ours, Section("peers", "m", rows=[Row("p", 11.0, "")])).outcome == "missed"
    assert verdict(aim, ours).outcome == "not measured"
    assert verdict(aim, ours, Section("peers", "m", rows=[Row("p", None, "", failed=True)])).outcome == "not measured"


def test_figures_for_one_gpu_are_no_aims_for_another() -> None:
    aim = Aim(what="", section="s", row="r", least=1.0, device="H200")
    section = Section("s", rows=[Row("r", 5.0, "")])
    assert verdict(aim, section).outcome == "met"
    assert verdict(aim, section, device="NVIDIA H100 80GB HBM3").outcome == "not measured"


def test_a_tiny_run_meets_nothing() -> None:
    section = Section("serving", "qwen3-0.6b", rows=[Row("decode, 1 stream", 9e9, "tokens/s")])
    assert "met" in {each.outcome for each in judge([section], "NVIDIA H200")}
    assert {each.outcome for each in judge([section], "NVIDIA H200", tiny=True)} == {"not measured"}


def test_aims_name_what_is_measured() -> None:
    jobs = {(job.section, job.model) for job in JOBS}
    for aim in AIMS:
        assert (aim.section, aim.model) in jobs
        assert (aim.least is None) != (aim.most is None)
        assert aim.over is None or (aim.over[0], aim.model) in jobs


def test_jobs_are_sections_of_models_and_fit_into_the_budget_as_far_as_aims_go() -> None:
    assert JOBS[0].section == LIMITS
    assert {job.section for job in JOBS} == set(MODULES)
    assert {job.model for job in JOBS} == {"", *model_names()}
    for section in MODULES:
        assert callable(runner_of(section))
    wanted = {(aim.section, aim.model) for aim in AIMS} | {("peers", "qwen3-8b"), (LIMITS, "")}
    last = max(i for i, job in enumerate(JOBS) if (job.section, job.model) in wanted)
    assert {(job.section, job.model) for job in JOBS[: last + 1]} - wanted == {("steps", "qwen3-8b")}


def test_jobs_can_be_chosen() -> None:
    assert chosen([], []) == list(JOBS)
    assert [(job.section, job.model) for job in chosen(["peers"], ["qwen3-1.7b"])] == [
        (LIMITS, ""),
        ("peers", "qwen3-1.7b"),
    ]
    assert {job.section for job in chosen(["kernels"], [])} == {LIMITS, "kernels"}
    assert {job.model for job in chosen([], ["qwen3-1.7b"])} == {"", "qwen3-1.7b"}
    assert {job.section for job in chosen([], ["qwen3-1.7b"])} == set(MODULES)


def test_rows_survive_being_written_and_a_line_that_was_cut_off_does_not_count() -> None:
    rows = [Row("a", 1.5, "ms", 1.0, 0.5, "note\nwith a line"), Row("b", None, "", note="failed: x", failed=True)]
    text = "".join(line_of(row) + "\n" for row in rows)
    assert rows_of(text) == rows
    assert rows_of(text[:-5]) == rows[:1]
    assert rows_of("") == []
    section = Section("s", "m", "stopped", "why", 2.0, rows)
    assert Section.from_json(json.loads(json.dumps(section.to_json()))) == section


def test_a_part_that_fails_costs_itself() -> None:
    rows = [*attempt("part", _divides_by_zero), *attempt("part", lambda: iter([Row("a", 1.0, "")]))]
    assert [(row.name, row.failed) for row in rows] == [("a", False), ("part", True), ("a", False)]
    assert "ZeroDivisionError" in rows[1].note
    with pytest.raises(torch.AcceleratorError):
        list(attempt("part", _device_fails))


def _divides_by_zero() -> Iterator[Row]:
    yield Row("a", 1.0, "")
    yield Row("b", 1 / 0, "")


def _device_fails() -> Iterator[Row]:
    yield Row("a", 1.0, "")
    raise torch.AcceleratorError("an illegal memory access was encountered")


def test_a_section_that_fails_costs_itself(tmp_path: Path) -> None:
    section = run_section(Job("serving", "no-such-model", 60), Setting("cpu", True, "no-such-model"), 60, tmp_path)
    assert (section.status, section.rows) == ("failed", [])
    assert "no model no-such-model" in section.reason
    assert "failed" in section_lines(section)[0]


def test_a_section_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    section = run_section(Job(LIMITS, "", 60), Setting("cpu", True), 0.05, tmp_path)
    assert time.monotonic() - began < 10
    assert section.status == "stopped"
    assert "more than its 0 s" in section.reason


def test_a_budget_that_is_used_up_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "folder" / "out.json"
    assert program.main(["--device", "cpu", "--tiny", "--budget", "0", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert len(content["sections"]) == len(JOBS)
    assert {(section["status"], section["reason"]) for section in content["sections"]} == {
        ("skipped", "the time was used up")
    }
    assert {aim["outcome"] for aim in content["aims"]} == {"not measured"}
    printed = capsys.readouterr().out
    assert printed.count("the time was used up") == len(JOBS)
    assert "not measured" in printed


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "cpu"], ["--models", "gpt-5"], ["--only", "everything"]):
        with pytest.raises(SystemExit):
            program.main(arguments)
    assert "there is no gpt-5; there are llama-3.1-8b" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no model gpt-5"):
        read_config("gpt-5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 1
    assert "--device cpu --tiny" in capsys.readouterr().err


def test_figures() -> None:
    assert [figure(value) for value in (0.0, 0.75, 12.345, 14_000.4, 1.5e-7)] == [
        "0",
        "0.75",
        "12.3",
        "14,000",
        "1.5e-07",
    ]


@pytest.mark.slow
def test_the_runtime_serves_where_the_package_for_grammars_is_missing() -> None:
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llguidance" else real(name, *rest)
from benchmarks.gpu.models import serve
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.streams import prompts, whole
served = serve(Setting("cpu", True, "qwen3-0.6b"))
print(whole(served.engine(), prompts(2, 9, 512, 1), 3).tokens_per_second > 0)
assert sys.modules["llguidance"].__spec__ is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    command = [str(ROOT / "scripts" / "bench_gpu.sh"), "--device", "cpu", "--tiny", "--models", "qwen3-30b-a3b"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(output.read_text())
    assert content["environment"]["versions"]["torch"]
    assert content["tiny"]
    sections = {section["name"]: Section.from_json(section) for section in content["sections"]}
    assert set(sections) == set(MODULES)
    assert {name: each.status for name, each in sections.items() if each.status != "done"} == {"start": "skipped"}
    assert "needs CUDA" in sections["start"].reason
    for section in sections.values():
        assert section.rows or section.name == "start"
        assert not [row for row in section.rows if row.failed or row.value is None], section
    rows = {(name, row.name): row for name, section in sections.items() for row in section.rows}
    assert 0 < (rows["serving", "decode, 1 stream"].share or 0) < 1
    assert (rows["peers", "generate_batch, 4 streams"].value or 0) > 0
