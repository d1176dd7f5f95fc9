"""Per-op benchmark over the registry: time, GB/s and the share of this machine's limits, parity first.

    python -m pytest bench --benchmark-sort=name --benchmark-columns=median,iqr,rounds
    python -m pytest bench --shape llama-3-8b --shape qwen3-4b -k "rms_norm or linear_cross_entropy"

Sizes are those of one layer of the named models. Each public function runs forward and backward once at these sizes,
and the operator calls it makes are recorded: every op is measured on the arguments it meets in training, once per
implementation, forward and backward ops apart. A function (forward alone, and with backward) stands beside its rivals:
eager, torch.compile, Liger, bitsandbytes, flash-attn, xformers; one that is not installed is skipped with the reason,
one that computes something else fails. Caches are overwritten before every call. Bytes and FLOPs come from the cost
models of our operators, copy bandwidth and matmul rate from the same run; the last table of the output shows them
(``conftest.py``). The default test run does not collect this file.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import op_times
import pytest
import rivals
import torch
import workloads

from fuselora import kernels
from fuselora.engine.heap import keep_freed_memory
from fuselora.kernels.registry import DISPATCH_KEY, FUNCTIONS, OPS, Cost, Sample
from fuselora.testing import assert_function_close

for path in Path(kernels.__path__[0]).glob("*.py"):
    importlib.import_module(f"fuselora.kernels.{path.stem}")

DEVICE, DTYPE, ROUNDS = workloads.DEVICE, torch.bfloat16, 15
keep_freed_memory(DEVICE)  # as in training, for rivals too
WATCH = machine.Stopwatch(DEVICE)
SIDES = ("fuselora", *rivals.NAMES)
FUNCTION_NAMES = sorted(workloads.functions(workloads.SMOKE, DTYPE, DEVICE))
IMPLEMENTATIONS = [
    (op.name, tag)
    for op in OPS.values()
    for tag in ("reference", *(t for t in op.impls if DISPATCH_KEY[t] == WATCH.key))
]


@functools.cache
def met(shape: str) -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    return workloads.operators(workloads.SHAPES[shape], DTYPE, DEVICE)


@functools.cache
def limits() -> dict[str, float]:
    return machine.limits(WATCH, smoke=False)


def timed(benchmark: Any, fn: Callable[[], Any], cost: Cost) -> None:
    """Time with cold caches, and beside it the work and what share of this machine's limits that is."""

    def run() -> None:
        fn()
        machine.synchronize(DEVICE)

    def flush() -> None:
        WATCH.flush.zero_()
        machine.synchronize(DEVICE)

    benchmark.pedantic(run, setup=flush, rounds=ROUNDS, warmup_rounds=3)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "ms": 1e3 * seconds,
        "MB": cost.bytes / 1e6,
        "GFLOP": cost.flops / 1e9,
        "GB/s": cost.bytes / seconds / 1e9,
        "GFLOP/s": cost.flops / seconds / 1e9,
        "of copy": cost.bytes / seconds / limits()["copy_bytes_per_s"],
        "of matmul": cost.flops / seconds / limits()["matmul_flop_per_s"],
    }


@pytest.mark.parametrize(("name", "tag"), IMPLEMENTATIONS)
def test_op(benchmark: Any, shape: str, name: str, tag: str) -> None:
    op = OPS[name]
    if not workloads.called_on(op, DEVICE):
        pytest.skip(f"nothing calls it on {DEVICE.type}")
    args = met(shape)[name]
    if tag == "reference":
        fn = op.reference
    elif reason := op.impls[tag].supports(*args):
        pytest.skip(reason)
    else:
        fn = op.impls[tag].fn
        op_times.op_parity(op, fn, args)
    timed(benchmark, lambda: fn(*args), op.cost(*args))


@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FUNCTION_NAMES)
def test_function(benchmark: Any, shape: str, name: str, side: str, direction: str) -> None:
    record = FUNCTIONS[workloads.function_name(name)]
    torch.manual_seed(0)
    args = workloads.functions(workloads.SHAPES[shape], DTYPE, DEVICE)[name]()
    if side == "fuselora":
        assert_function_close(record, Sample("layer", args))
        fn = record.fn
    elif side not in (sides := rivals.rivals(record)):
        pytest.skip(f"{side} has no such function")
    else:
        try:
            fn = sides[side]()
        except rivals.Missing as missing:
            pytest.skip(str(missing))
        rivals.check_agreement(record, side, fn, args)
    call = (lambda: fn(*args)) if direction == "forward" else op_times.forward_backward(fn, args)
    timed(benchmark, call, workloads.cost_of(name, args, backward=direction == "both"))
