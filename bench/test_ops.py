"""Per-op benchmark over the registry: time, GB/s and the share of this machine's limits, parity first.

    python -m pytest bench/test_ops.py --benchmark-sort=name --benchmark-columns=median,iqr,rounds
    python -m pytest bench/test_ops.py --shape llama-3-8b --shape qwen3-4b -k "rms_norm or linear_cross_entropy"

Sizes are those of one layer of the named models. Each public function runs forward and backward once at these sizes,
and the operator calls it makes are recorded: every op is measured on the arguments it meets in training, once per
implementation. A function (forward plus backward) stands beside its rivals: eager, torch.compile, Liger, bitsandbytes,
flash-attn, xformers; one that is not installed is skipped with the reason. Caches are overwritten before every call.
Bytes and FLOPs come from the op's own cost model, copy bandwidth and matmul rate from the same run. The default test
run does not collect this file.
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
from fuselora.kernels.registry import DISPATCH_KEY, FUNCTIONS, OPS, Sample
from fuselora.testing import assert_function_close

for path in Path(kernels.__path__[0]).glob("*.py"):
    importlib.import_module(f"fuselora.kernels.{path.stem}")

DEVICE, DTYPE, ROUNDS = workloads.DEVICE, torch.bfloat16, 15
keep_freed_memory(DEVICE)  # as in training, for rivals too
WATCH = machine.Stopwatch(DEVICE)
SIDES = ("fuselora", *rivals.NAMES)
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


def timed(benchmark: Any, fn: Callable[[], Any]) -> float | None:
    """Median seconds with cold caches; None under --benchmark-disable."""

    def run() -> None:
        fn()
        machine.synchronize(DEVICE)

    def flush() -> None:
        WATCH.flush.zero_()
        machine.synchronize(DEVICE)

    benchmark.pedantic(run, setup=flush, rounds=ROUNDS, warmup_rounds=3)
    return benchmark.stats.stats.median if benchmark.stats else None


@pytest.mark.parametrize(("name", "tag"), IMPLEMENTATIONS)
def test_op(benchmark: Any, shape: str, name: str, tag: str) -> None:
    op, args = OPS[name], met(shape).get(name)
    if args is None:
        pytest.skip("no function of bench/workloads.py calls it")
    if tag == "reference":
        fn = op.reference
    elif reason := op.impls[tag].supports(*args):
        pytest.skip(reason)
    else:
        fn = op.impls[tag].fn
        op_times.op_parity(op, fn, args)
    if (seconds := timed(benchmark, lambda: fn(*args))) is not None:
        cost = op.cost(*args)
        benchmark.extra_info["GB/s"] = round(cost.bytes / seconds / 1e9, 2)
        benchmark.extra_info["GFLOP/s"] = round(cost.flops / seconds / 1e9, 2)
        benchmark.extra_info["of copy bandwidth"] = round(cost.bytes / seconds / limits()["copy_bytes_per_s"], 3)
        benchmark.extra_info["of matmul rate"] = round(cost.flops / seconds / limits()["matmul_flop_per_s"], 3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(benchmark: Any, shape: str, name: str, side: str) -> None:
    record, make = FUNCTIONS[name], workloads.functions(workloads.SHAPES[shape], DTYPE, DEVICE).get(name)
    if make is None:
        pytest.skip("it has no arguments in bench/workloads.py")
    torch.manual_seed(0)
    args = make()
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
    timed(benchmark, op_times.forward_backward(fn, args))
