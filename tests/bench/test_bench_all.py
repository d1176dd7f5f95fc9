"""bench/bench_all.py: its runs are runs that exist, and a record of this very commit is not made again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench_all
import gpu_suite
import plans
import pytest
import report
import train_step


@pytest.fixture
def suite(tmp_path):
    options = {"out": tmp_path, "budget": 100.0, "only": None, "smoke": False, "device": "cpu", "plan": "cpu"}
    return bench_all.CpuSuite(SimpleNamespace(**options, save=False))


@pytest.mark.parametrize("plan", bench_all.PLANS)
def test_step_runs_have_arguments_that_parse(suite, plan):
    for name, run in bench_all.PLANS[plan].items():
        words = suite.arguments(name, run, 100.0)
        assert (report.ROOT / words[1]).is_file()
        if run.script == plans.STEP:
            args = train_step.parse_arguments(words[2:])
            assert args.preset == "cpu" and str(args.json).endswith(f"{name}.json")


def test_gpu_plans_have_arguments_that_parse():
    for plan in gpu_suite.PLANS.values():
        for run in plan.values():
            assert train_step.parse_arguments([*run.arguments, "--device", "cpu"]).baseline[:2] == ["peft", "peft-bf16"]


def test_the_default_plan_fits_twenty_minutes():
    assert sum(run.seconds for run in plans.CPU.values()) < 1200


def test_the_grid_is_the_whole_product():
    parsed = [train_step.parse_arguments(run.arguments) for run in plans.grid("cpu", 1e-3).values()]
    points = {(a.quantize, a.prepared, a.adapter_dtype, a.checkpointing, a.packed, a.seq) for a in parsed}
    assert len(points) == len(parsed) == 4 * 2 * 2 * len(plans.TOKENS)
    assert {a.seq for a in parsed} == set(plans.TOKENS) and {a.batch for a in parsed} == {1}
    assert all(a.baseline == list(plans.LADDER) for a in parsed)


def test_kept_records_fill_the_tables_and_failed_ones_do_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_all.tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench_all.tables, "DOCUMENTS", ())
    of = {"machine": "some-cpu", "date": "2026-01-02"}
    for name, record in {
        "good": {"environment": of, "runs": [{"sides": []}]},
        "wrong": {"environment": of, "runs": [{"parity": []}]},
        "tiny": {"environment": of, "smoke": True},
        "suite": {"cpu": {}},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    bench_all.keep(tmp_path)
    assert [path.name for path in (tmp_path / "results" / "some-cpu").iterdir()] == ["good-2026-01-02.json"]
    assert capsys.readouterr().out.count("not kept, it holds no figures") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "cpu-9"], "--only: expected runs of plan cpu (cpu, cpu-nf4"),
        (["--smoke", "--save"], "--save: expected measured records, got --smoke"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        bench_all.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_a_record_of_this_commit_is_not_repeated(suite, tmp_path, monkeypatch, capsys):
    state = {"commit": "a" * 40, "dirty": False}
    monkeypatch.setattr(report, "git_state", lambda: state)
    monkeypatch.setattr(bench_all.write_report, "write", lambda *folders: "report.md")
    started = []
    monkeypatch.setattr(suite, "run", lambda name, command, limit: started.append(name) or True)
    monkeypatch.setattr(type(suite), "left", 1e6)
    suite.args.only = ["cpu"]
    for made, repeated in ((state, False), (state | {"dirty": True}, True), (state | {"commit": "b" * 40}, True)):
        (tmp_path / "cpu.json").write_text(json.dumps({"environment": {"git": made}}))
        started.clear()
        assert suite.all() and bool(started) is repeated
    assert "cpu: its record is of this commit, not repeated" in capsys.readouterr().out


def test_what_does_not_fit_the_budget_is_said(suite, capsys, monkeypatch):
    suite.end = 0.0
    monkeypatch.setattr(bench_all.write_report, "write", lambda *folders: "report.md")
    assert suite.all()
    assert capsys.readouterr().out.count("skipped, 0 s left") == len(plans.CPU)
