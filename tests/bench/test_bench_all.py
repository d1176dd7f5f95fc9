"""bench/bench_all.py: its runs are runs that exist, and a record of this very commit is not made again."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench_all
import pytest
import report
import train_step


@pytest.fixture
def suite(tmp_path):
    return bench_all.CpuSuite(SimpleNamespace(out=tmp_path, budget=100.0, only=None, smoke=False, device="cpu"))


def test_step_runs_have_arguments_that_parse(suite):
    for name, ((script, *_), _) in bench_all.RUNS.items():
        words = suite.arguments(name, 100.0)
        assert (report.ROOT / words[1]).is_file()
        if script == bench_all.STEP:
            args = train_step.parse_arguments(words[2:])
            assert args.preset == "cpu" and str(args.json).endswith(f"{name}.json")


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
    assert capsys.readouterr().out.count("skipped, 0 s left") == len(bench_all.RUNS)
