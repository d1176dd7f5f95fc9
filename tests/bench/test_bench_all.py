"""bench/bench_all.py: its runs are runs that exist, and a record of this very commit is not made again."""

from __future__ import annotations

import json

import bench_all
import gpu_suite
import ladder
import models
import plans
import pytest
import report
import train_step


@pytest.fixture
def suite(tmp_path):
    return bench_all.CpuSuite(bench_all.parse_arguments(["--out", str(tmp_path), "--budget", "100"]))


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
            args = train_step.parse_arguments([*run.arguments, "--device", "cpu"])
            assert args.toggle or args.baseline[0] == "peft"


def test_the_default_plan_fits_twenty_minutes():
    assert sum(run.seconds for run in plans.CPU.values()) < 1200


def test_the_headline_of_a_gpu_fits_one_call():
    assert tuple(plans.GPU)[: len(plans.HEADLINE)] == plans.HEADLINE
    assert sum(plans.GPU[name].seconds for name in plans.HEADLINE) < 540 < 600


def test_stock_at_its_best_is_a_rung():
    """bf16 adapters take away fp32 casts, compilation the rest: both together and under everyone's kernels."""
    for plan in (plans.CPU["cpu"], plans.GPU["steps-0"]):
        sides = [
            models.parse_side(name)
            for name in train_step.parse_arguments([*plan.arguments, "--device", "cpu"]).baseline
        ]
        assert any(side.compiled and side.same_dtype for side in sides)
        assert {side.rung for side in sides if side.rung} == {*ladder.RUNGS, "unsloth"}
        assert all(side.same_dtype for side in sides if side.rung in ladder.RUNGS)


def test_the_grid_is_the_whole_product():
    runs = plans.grid("cpu", 1e-3).values()
    parsed = [train_step.parse_arguments(run.arguments) for run in runs]
    points = {(a.quantize, a.prepared, a.adapter_dtype, a.checkpointing, a.layout, a.batch * a.seq) for a in parsed}
    assert len(points) == len(parsed) == 4 * 2 * 3 * len(plans.TOKENS)
    assert {a.batch * a.seq for a in parsed} == set(plans.TOKENS)
    for args in parsed:
        sides = [models.parse_side(name, args.adapter_dtype == "same") for name in args.baseline]
        different = {(side.compiled, side.same_dtype, side.rung) for side in sides}
        assert len(different) == len(sides), "the same program twice"
        assert {side.rung for side in sides if side.rung} == {*ladder.RUNGS, "unsloth"}
        assert any(side.compiled for side in sides)
    kinds = {
        (a.quantize, a.prepared, a.adapter_dtype, a.checkpointing, a.layout) for a in parsed if a.parity_steps == 200
    }
    assert len(kinds) == 4 * 2 * 3, "a loss curve of 200 steps for each kind of step"


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
    bench_all.tables.keep(tmp_path)
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


def test_a_record_of_this_code_is_not_repeated(suite, tmp_path, monkeypatch, capsys):
    state = {"commit": "a" * 40, "dirty": False, "source": "1234"}
    monkeypatch.setattr(report, "git_state", lambda: state)
    monkeypatch.setattr(bench_all.write_report, "write", lambda *folders: "report.md")
    started = []
    monkeypatch.setattr(suite, "run", lambda name, command, limit: started.append(name) or True)
    monkeypatch.setattr(type(suite), "left", 1e6)
    suite.args.only = ["cpu"]
    for made, repeated in (
        (state, False),
        (state | {"source": "5678"}, True),
        ({"commit": "a" * 40, "dirty": False}, True),
    ):
        (tmp_path / "cpu.json").write_text(json.dumps({"environment": {"git": made}, "runs": [{"sides": []}]}))
        started.clear()
        assert suite.all() and bool(started) is repeated
    assert "cpu: its record is of this code, not repeated" in capsys.readouterr().out
    failed = {"environment": {"git": state}, "runs": [{"sides": []}, {"parity": [{"ok": False}]}]}
    (tmp_path / "cpu.json").write_text(json.dumps(failed))
    started.clear()
    assert suite.all() and started, "a run without parity must not pass for one that was measured"


def test_what_does_not_fit_the_budget_is_said(suite, capsys, monkeypatch):
    suite.end = 0.0
    monkeypatch.setattr(bench_all.write_report, "write", lambda *folders: "report.md")
    assert suite.all()
    assert capsys.readouterr().out.count("skipped, 0 s left") == len(plans.CPU)
