"""The GPU suite end to end without a GPU: every stage runs, records as it goes, and survives what fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gpu_suite
import op_times
import plans
import pytest
import report
import suite_table
import torch
import torch.nn.functional as F
from rivals import Missing, rivals
from stage import Stage

from fuselora.kernels.registry import FUNCTIONS, OPS, Impl

BENCH = Path(gpu_suite.__file__).parent


def test_smoke_run_on_cpu_records_every_stage(tmp_path):
    stages = ("first", "choices", "layer", "kernels", "steps")
    command = [sys.executable, str(BENCH / "gpu_suite.py"), "--out", str(tmp_path), "--device", "cpu", "--smoke"]
    run = subprocess.run(
        [*command, "--budget", "500", *(f"--only={stage}" for stage in stages)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert {name: result["runs"][0]["ended"] for name, result in suite.items()} == dict.fromkeys(stages, "ok")
    for name in ("first", "choices", "layer", "kernels"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["smoke"] and record["entries"] and not record["skipped"]
        assert record["machine"].keys() == {"copy_bytes_per_s", "matmul_flop_per_s", "matmul_fp32_flop_per_s"}
        assert not any("error" in entry for entry in record["entries"])
    names = {entry["name"].split()[1] for entry in record["entries"]}
    assert set(OPS) <= names, f"not measured: {set(OPS) - names}"
    printed = (tmp_path / "table.txt").read_text()
    assert "SMOKE RUN" in printed and "step of tiny" in printed and "stage kernels  ok" in printed


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path), "--budget", "60", "--device", "cpu", "--smoke"])
    return Stage("demo", None)


def test_a_failed_measurement_is_recorded_and_the_next_one_runs(stage):
    def broken():
        raise ValueError("wrong by 3")

    stage.measure("broken", broken)
    stage.measure("good", lambda: {"seconds": 1.0})
    stage.measure("too long", lambda: {}, seconds=1e9)
    record = json.loads(stage.path.read_text())
    assert record["entries"] == [
        {"name": "broken", "error": "ValueError: wrong by 3"},
        {"name": "good", "seconds": 1.0},
    ]
    assert record["skipped"] == ["too long"] and stage.exit_code() == 1


def test_a_stage_goes_on_where_the_same_code_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr("stage.limits", lambda watch, smoke: {})
    state = {
        "commit": None,
        "dirty": True,
        "source": "1234",
    }  # no repository, or a changed one: the code is what counts
    monkeypatch.setattr(report, "git_state", lambda: dict(state))
    first = Stage("demo", None)
    first.measure("good", lambda: {"seconds": 1.0})
    first.measure("bad", lambda: 1 // 0)
    again = Stage("demo", None)
    again.measure("good", lambda: {"seconds": 2.0})
    again.measure("bad", lambda: {"seconds": 3.0})
    found = {entry["name"]: entry["seconds"] for entry in json.loads(again.path.read_text())["entries"]}
    assert found == {"good": 1.0, "bad": 3.0}
    state["source"] = "5678"
    assert Stage("demo", None).record["entries"] == []


def test_a_wrong_kernel_gets_no_figure(stage, monkeypatch):
    op = OPS["rms_norm"]
    wrong = Impl("cpu", lambda *args: tuple(1.1 * y for y in op.reference(*args)), lambda *args: None)
    monkeypatch.setitem(op.impls, "cpu", wrong)
    (case,) = op_times.op_cases(op, stage, {})
    with pytest.raises(AssertionError, match="rms_norm"):
        op_times.measure_op(op, "cpu", case, stage)


@pytest.mark.parametrize(
    ("function", "rival", "module"),
    [
        ("rms_norm", "liger", "liger-kernel"),
        ("attention", "flash-attn", "flash-attn"),
        ("attention", "xformers", "xformers"),
    ],
)
def test_a_missing_rival_is_named(monkeypatch, function, rival, module):
    for name in ("liger_kernel.transformers", "flash_attn", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Missing, match=f"{module} is not installed"):
        rivals(FUNCTIONS[function])[rival]()


def test_rivals_of_attention_get_their_own_layouts(monkeypatch):
    """Stand-ins with the packages' signatures, made of SDPA, must give what eager gives."""
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    eager = FUNCTIONS["attention"].eager(q, k, v)

    def flash(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def efficient(q, k, v, attn_bias):
        q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=attn_bias).transpose(1, 2).unflatten(2, (2, 2))

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash))
    ops = SimpleNamespace(LowerTriangularMask=lambda: True, memory_efficient_attention=efficient)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    for name in ("flash-attn", "xformers"):
        torch.testing.assert_close(rivals(FUNCTIONS["attention"])[name]()(q, k, v), eager)


def test_a_stage_that_hangs_is_killed_and_said(tmp_path):
    class Args:
        out, budget, only, device, smoke = tmp_path, 60.0, None, "cpu", True

    suite = gpu_suite.Suite(Args)
    assert not suite.run("first", [sys.executable, "-c", "import time; print('in', flush=True); time.sleep(60)"], 2.0)
    (run,) = suite.results["first"]["runs"]
    assert run["ended"] == "out of time" and (tmp_path / "first.log").read_text() == "in\n"
    assert "out of time" in suite_table.table(tmp_path)


class Options:
    budget, only, device, smoke, plan, save = 600.0, None, "cpu", False, "headline", False

    def __init__(self, out):
        self.out = out


@pytest.fixture
def called(monkeypatch):
    """Commands that the suite would start; those in ``fails`` end with 1."""
    calls, fails = [], set()

    def start(suite, name, command, limit):
        calls.append(name)
        ended = {"command": command, "s": 1.0, "ended": "failed with 1" if name in fails else "ok", "at": suite.state}
        suite.results.setdefault(name, {"runs": []})["runs"].append(ended)
        report.write_json(suite.results, suite.out / "suite.json")
        if name == "steps" and name not in fails:
            path = Path(command[command.index("--json") + 1])
            report.write_json({"environment": {"git": report.git_state()}, "runs": [{"sides": []}]}, path)
        return name not in fails

    monkeypatch.setattr(gpu_suite.Suite, "run", start)
    monkeypatch.setattr(suite_table, "table", lambda folder: "")
    return calls, fails


def test_a_second_call_repeats_neither_build_nor_tests_nor_steps(tmp_path, called):
    calls, fails = called
    fails.add("tests")
    assert not gpu_suite.Suite(Options(tmp_path)).all()
    first = Counter(calls)
    assert first["build"] >= 1 and first["tests"] == 1 and first["steps"] == len(plans.GPU)
    calls.clear(), fails.clear()
    assert gpu_suite.Suite(Options(tmp_path)).all()
    again = Counter(calls)
    assert "build" not in again and again["tests"] == 1, "what failed is tried again, what passed is not"
    assert again["steps"] == 0
    text = (tmp_path / "suite.json").read_text()
    (tmp_path / "suite.json").write_text(text.replace(report.source_hash(), "of other code"))
    assert not gpu_suite.Suite(Options(tmp_path)).passed("build")


def test_without_bitsandbytes_its_runs_are_named_and_the_others_run(tmp_path, called, monkeypatch, capsys):
    calls, _ = called
    monkeypatch.setattr(gpu_suite.util, "find_spec", lambda name: None)
    suite = gpu_suite.Suite(Options(tmp_path))
    assert suite.all()
    quantised = [name for name, run in plans.GPU.items() if "--quantize" in run.arguments]
    assert suite.results["steps"]["skipped"] == quantised and len(quantised) == 3
    assert calls.count("steps") == len(plans.GPU) - 3
    assert capsys.readouterr().out.count("not run: bitsandbytes is not installed") == 3


def test_a_killed_suite_leaves_no_measurement_behind(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import gpu_suite; from types import SimpleNamespace as N;"
        f" from pathlib import Path; out = Path({str(tmp_path)!r});"
        " suite = gpu_suite.Suite(N(out=out, budget=60.0, only=None, device='cpu', smoke=True));"
        f" suite.run('x', [sys.executable, '-c', {child!r}], 50.0)"
    )
    suite = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        suite.kill()
        suite.wait()
        while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < end - 5:
            time.sleep(0.1)
        assert not Path(f"/proc/{pid.read_text()}").exists()
    finally:
        suite.kill()


def test_the_headline_comes_before_the_ops(tmp_path, called, monkeypatch):
    calls, _ = called
    gpu_suite.Suite(Options(tmp_path)).all()
    assert calls.index("steps") < calls.index("kernels")


def test_no_cuda_device_ends_with_2_and_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main([])
    assert stop.value.code == 2 and "expected a CUDA device, got none" in capsys.readouterr().err
