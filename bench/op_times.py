"""Every op and every public function of the registry at the sizes of real models: parity, time, share of the machine.

    python bench/op_times.py --out build/gpu [--device cpu]

Ops run on the registry's workloads (on CPU, and where an op has none, on what they meet in a layer), once per
implementation: time, bytes of the op's own cost model per second as a share of this run's copy bandwidth, FLOPs as a
share of its matmul rate. Functions run forward plus backward beside their rivals (``rivals.py``) at one Llama-3-8B
layer of 4096 tokens, on CPU at one of the ``cpu`` preset; bytes and FLOPs of all of them are those of our operators.
Both pass the numerics rule against fp64 in the same run or get no figure, and a rival must compute what eager computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import workloads
from rivals import Missing, check_agreement, rivals
from stage import Stage
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fuselora.functional  # noqa: F401  (fills the registry)
from fuselora.kernels.numerics import K_ELEMENTWISE, K_REDUCTION
from fuselora.kernels.registry import DISPATCH_KEY, FUNCTIONS, OPS, Cost, Function, Op, Sample
from fuselora.testing import assert_function_close, assert_kernel_close

ENOUGH_SECONDS = 6.0  # a measurement is not begun with less time left


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def doubled(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def op_cases(op: Op, stage: Stage, met: dict[str, tuple[Any, ...]]) -> Iterator[Sample]:
    """Its workloads on a GPU, else what it meets in a layer; in smoke runs its first sample that holds data."""
    if stage.smoke:
        samples = op.samples(torch.bfloat16, stage.device)
        yield next(s for s in samples if all(t.numel() for t in tensors(s.args)))
        return
    found = list(op.workloads(torch.bfloat16, stage.device)) if stage.device.type == "cuda" else []
    yield from found or [Sample("layer", met[op.name])]


def op_parity(op: Op, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The numerics rule on what ``fn`` returns and, where it updates arguments, on those."""
    k = K_REDUCTION if op.long_reduction else K_ELEMENTWISE
    updates = "!" in op.schema

    def results(of: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
        given = workloads.copied(given) if updates else given
        return tensors((of(*given), given if updates else ()))

    exactly, stock = results(op.reference, tree_map(doubled, args)), results(op.reference, args)
    for ours, exact, theirs in zip(results(fn, args), exactly, stock, strict=True):
        if ours.is_floating_point():
            assert_kernel_close(ours, exact, theirs, name=op.name, k=k)
        else:
            assert torch.equal(ours, theirs), f"{op.name}: codes differ"


def measure_op(op: Op, tag: str, case: Sample, stage: Stage) -> dict[str, Any]:
    fn = op.reference if tag == "reference" else op.impls[tag].fn
    if tag != "reference":
        if reason := op.impls[tag].supports(*case.args):
            return {"refused": reason}
        op_parity(op, fn, case.args)
    seconds, cost = stage.watch.seconds(lambda: fn(*case.args)), op.cost(*case.args)
    return {
        "parity": True,
        "seconds": seconds,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "share_of_copy": cost.bytes / seconds / stage.limits["copy_bytes_per_s"],
        "share_of_matmul": cost.flops / seconds / stage.limits["matmul_flop_per_s"],
    }


def forward_backward(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], None]:
    """A call that runs ``fn`` and differentiates all its outputs by all its inputs that require grad."""
    inputs = [x for x in tensors(args) if x.requires_grad]
    upstream = [torch.randn_like(y) for y in tensors(fn(*args))]
    return lambda: torch.autograd.grad(tensors(fn(*args)), inputs, upstream) and None


def measure_function(record: Function, name: str, args: tuple[Any, ...], cost: Cost, stage: Stage) -> dict[str, Any]:
    """Forward plus backward of ours or of a rival, in seconds, with peak memory above the inputs on CUDA."""
    if name == "fuselora":
        assert_function_close(record, Sample("workload", args))
        fn = record.fn
    else:
        try:
            fn = rivals(record)[name]()
        except Missing as missing:
            return {"missing": str(missing)}
        check_agreement(record, name, fn, args)
    step = forward_backward(fn, args)
    seconds = stage.watch.seconds(step)
    figures = {"seconds": seconds, "forward_s": stage.watch.seconds(lambda: fn(*args))}
    figures |= {"bytes": cost.bytes, "flops": cost.flops}
    figures["share_of_copy"] = cost.bytes / seconds / stage.limits["copy_bytes_per_s"]
    figures["share_of_matmul"] = cost.flops / seconds / stage.limits["matmul_flop_per_s"]
    if stage.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures


def main() -> int:
    stage = Stage("kernels", __doc__)
    key, on_cpu = stage.device.type.upper(), stage.device.type == "cpu"
    shape = workloads.SMOKE if stage.smoke else workloads.SHAPES["cpu" if on_cpu else "llama-3-8b"]
    met = {} if stage.smoke else workloads.operators(shape, torch.bfloat16, stage.device)
    for op in OPS.values():
        if not workloads.called_on(op, stage.device):
            continue
        tags = [*(tag for tag in op.impls if DISPATCH_KEY[tag] == key), "reference"]
        for case in op_cases(op, stage, met):
            for tag in tags:
                name = f"op {op.name} [{case.name}] {tag}"
                stage.measure(name, measure_op, op, tag, case, stage, seconds=ENOUGH_SECONDS)
    for name, make in workloads.functions(shape, torch.bfloat16, stage.device).items():
        record, args = FUNCTIONS[workloads.function_name(name)], make()
        cost = workloads.cost_of(name, args)
        for side in ("fuselora", *rivals(record)):
            if stage.smoke and side == "compile" and name != "rms_norm":
                continue  # one compilation shows that it runs; each takes seconds
            label = f"function {name} {side}"
            stage.measure(label, measure_function, record, side, args, cost, stage, seconds=ENOUGH_SECONDS)
    return stage.exit_code()


if __name__ == "__main__":
    sys.exit(main())
