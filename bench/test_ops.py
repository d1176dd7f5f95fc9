"""Per-op benchmark over the registry: time, GB/s and the share of this machine's copy bandwidth, parity first.

    python -m pytest bench/test_ops.py --benchmark-sort=name --benchmark-columns=median,iqr,rounds

Sizes are those of one layer of the ``cpu`` preset at 1024 tokens. Each public function runs forward and backward once
at these sizes, and the operator calls it makes are recorded: every op is measured on the arguments it meets in
training. An op is timed per implementation, a function (forward and backward) against its eager twin. Bytes come from
the op's own cost model, copy bandwidth from the same run. The default test run does not collect this file.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import workloads
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fuselora import kernels
from fuselora.kernels.numerics import K_ELEMENTWISE, K_REDUCTION
from fuselora.kernels.registry import DISPATCH_KEY, FUNCTIONS, OPS, Op, Sample
from fuselora.testing import assert_function_close, assert_kernel_close, run_with_grads

for path in Path(kernels.__path__[0]).glob("*.py"):
    importlib.import_module(f"fuselora.kernels.{path.stem}")

DEVICE, DTYPE = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16
SIZED = {name: make for name, make in workloads.functions(workloads.CPU, DTYPE, DEVICE).items() if name in FUNCTIONS}


@functools.cache
def sample(name: str) -> Sample:
    torch.manual_seed(0)
    return Sample("sized", SIZED[name]())


@functools.cache
def recorded() -> dict[str, tuple[Any, ...]]:
    """Op name -> arguments of its first call while the sized functions run forward and backward."""
    calls: dict[str, tuple[Any, ...]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fuselora":
                copies = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, args)
                calls.setdefault(func._schema.name.partition("::")[2], copies)
            return func(*args, **(kwargs or {}))

    with Recorder():
        for name in SIZED:
            run_with_grads(FUNCTIONS[name].fn, sample(name))
    return calls


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy larger than the caches: the best of ten."""
    source = torch.ones(256 << 20, dtype=torch.uint8, device=DEVICE)
    target = source.clone()
    return 2 * source.numel() / min(seconds_of(lambda: target.copy_(source)) for _ in range(10))


def seconds_of(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    synchronized(fn)
    return time.perf_counter() - start


def synchronized(fn: Callable[[], Any]) -> None:
    fn()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def implementations(op: Op) -> dict[str, Callable[..., Any]]:
    key = {"cpu": "CPU", "cuda": "CUDA"}[DEVICE.type]
    return {"reference": op.reference} | {i.tag: i.fn for i in op.impls.values() if DISPATCH_KEY[i.tag] == key}


def tensors(outputs: Any) -> list[Tensor]:
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]


def doubled(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize(("name", "tag"), [(op.name, tag) for op in OPS.values() for tag in implementations(op)])
def test_op(benchmark: Any, name: str, tag: str) -> None:
    op, args = OPS[name], recorded().get(name)
    if args is None:
        pytest.skip("no function in SIZED calls it")
    fn = implementations(op)[tag]
    if tag != "reference":
        if reason := op.impls[tag].supports(*args):
            pytest.skip(reason)
        k = K_REDUCTION if op.long_reduction else K_ELEMENTWISE
        truth, eager = op.reference(*tree_map(doubled, args)), op.reference(*args)
        for triple in zip(tensors(fn(*args)), tensors(truth), tensors(eager), strict=True):
            assert_kernel_close(*triple, name=name, k=k)
    benchmark.pedantic(lambda: synchronized(lambda: fn(*args)), rounds=15, warmup_rounds=3)
    if benchmark.stats:  # None under --benchmark-disable
        cost, seconds = op.cost(*args), benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(cost.bytes / seconds / 1e9, 2)
        benchmark.extra_info["GFLOP/s"] = round(cost.flops / seconds / 1e9, 2)
        benchmark.extra_info["share of copy bandwidth"] = round(cost.bytes / seconds / copy_bandwidth(), 3)


@pytest.mark.parametrize("which", ["fuselora", "eager"])
@pytest.mark.parametrize("name", sorted(SIZED))
def test_function(benchmark: Any, name: str, which: str) -> None:
    record, args = FUNCTIONS[name], sample(name).args
    if which == "fuselora":
        assert_function_close(record, sample(name))
    fn = record.fn if which == "fuselora" else record.eager
    inputs = [x for x in tensors(args) if x.requires_grad]
    upstream = [torch.randn_like(y) for y in tensors(fn(*args))]

    def forward_backward() -> None:
        torch.autograd.grad(tensors(fn(*args)), inputs, upstream)

    benchmark.pedantic(lambda: synchronized(forward_backward), rounds=15, warmup_rounds=3)
