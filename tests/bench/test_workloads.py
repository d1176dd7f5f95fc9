"""bench/workloads.py: what is registered is measured, on arguments of a real layer; rivals must do the same work."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import op_times
import pytest
import rivals
import torch
import workloads

from fuselora import kernels
from fuselora.kernels.registry import FUNCTIONS, OPS, Impl

BENCH = Path(workloads.__file__).parent
CPU = torch.device("cpu")

for module in Path(kernels.__path__[0]).glob("*.py"):
    importlib.import_module(f"fuselora.kernels.{module.stem}")


@pytest.fixture(scope="module")
def met():
    torch.manual_seed(0)
    return workloads.operators(workloads.SMOKE, torch.bfloat16, CPU)


def test_every_registered_op_and_function_is_measured(met):
    assert set(OPS) <= set(met), f"add to bench/workloads.py what calls {sorted(set(OPS) - set(met))}"
    named = {workloads.function_name(name) for name in workloads.functions(workloads.SMOKE, torch.bfloat16, CPU)}
    assert named == set(FUNCTIONS), f"bench/workloads.py: {sorted(named ^ set(FUNCTIONS))}"


def test_an_op_that_updates_its_arguments_is_judged_by_what_it_leaves(met):
    op = OPS["adamw_"]
    args = met["adamw_"]
    before = args[0][0].clone()
    op_times.op_parity(op, op.reference, args)
    assert torch.equal(args[0][0], before), "the gate used up the arguments that are timed next"

    def forgets_the_weights(params, *rest):
        return op.reference([p.clone() for p in params], *rest)

    with pytest.raises(AssertionError, match="adamw_"):
        op_times.op_parity(op, forgets_the_weights, args)


@pytest.mark.parametrize("wrong", [lambda x, w: 1.2 * FUNCTIONS["rms_norm"].eager(x, w), lambda x, w: x.t()])
def test_a_rival_that_does_other_work_gets_no_figure(wrong):
    record, args = FUNCTIONS["rms_norm"], workloads.functions(workloads.SMOKE, torch.bfloat16, CPU)["rms_norm"]()
    rivals.check_agreement(record, "compile", lambda x, w: record.eager(x.float(), w.float()).bfloat16(), args)
    with pytest.raises(AssertionError, match="liger"):
        rivals.check_agreement(record, "liger", wrong, args)


def test_work_of_a_function_is_that_of_its_operators():
    args = workloads.functions(workloads.SMOKE, torch.bfloat16, CPU)["rms_norm"]()
    forward, both = (workloads.cost_of("rms_norm", args, backward=both) for both in (False, True))
    x, rstd = args[0].numel() * 2, args[0].shape[0] * 4
    assert forward.bytes >= 2 * x + rstd and both.bytes >= forward.bytes + 3 * x


def test_ops_of_the_processor_are_not_asked_of_a_gpu():
    op, cuda = OPS["lora_project_4bit"], torch.device("cuda")
    assert workloads.called_on(op, CPU) and not workloads.called_on(op, cuda)
    everywhere = replace(op, impls=op.impls | {"triton": Impl("triton", op.reference, lambda *args: None)})
    assert workloads.called_on(everywhere, cuda) and workloads.called_on(OPS["adamw_"], CPU)


def test_pytest_bench_prints_rates_and_reasons():
    chosen = "add_rms_norm and (fuselora or xformers) and forward"
    command = [sys.executable, "-m", "pytest", "bench", "-n", "0", "-k", chosen]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # workers don't time
    run = subprocess.run(command, cwd=BENCH.parent, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    (header,) = [line for line in run.stdout.splitlines() if "GB/s" in line]
    assert header.split() == ["ms", "MB", "GFLOP", "GB/s", "GFLOP/s", "of", "copy", "of", "matmul"]
    assert "test_function[cpu-add_rms_norm-fuselora-forward]" in run.stdout
    assert "xformers has no such function" in run.stdout
