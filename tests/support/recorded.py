"""What the Triton implementations of ops would launch at the sizes of real models, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fuselora.functional  # noqa: F401  (imports every kernel file, which fills the registry)
from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import Launch, record
from fuselora.kernels.registry import OPS, Op, Sample

META = torch.device("meta")
# Multiprocessors of a common card of each capability: T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Recorded:
    """One launch of an op's Triton implementation on one workload."""

    op: str
    workload: str
    dtype: torch.dtype
    launch: Launch

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__

    @property
    def where(self) -> str:
        return f"{self.op}[{self.workload}, {str(self.dtype).removeprefix('torch.')}] {self.kernel}"

    @property
    def budget(self) -> aot.Budget | None:
        """The kernel's own, None if its module names none."""
        return getattr(sys.modules[self.launch.kernel.fn.__module__], "BUDGETS", {}).get(self.kernel)


def triton_ops() -> list[str]:
    return sorted(name for name, op in OPS.items() if "triton" in op.impls)


def launches(op: Op, sample: Sample, capability: int) -> list[Launch] | str:
    """What the op's Triton implementation launches for these arguments, or why it refuses them."""
    with record(capability, MULTIPROCESSORS[capability]) as recorded:
        reason = op.impls["triton"].supports(*sample.args)
        if reason:
            return reason
        op.impls["triton"].fn(*sample.args)
    return recorded


def workload_launches(name: str, capability: int, dtype: torch.dtype) -> Iterator[Recorded | tuple[str, str]]:
    """Every launch of every workload; (workload, reason) for one that is refused."""
    for sample in OPS[name].workloads(dtype, META):
        found = launches(OPS[name], sample, capability)
        if isinstance(found, str):
            yield sample.name, found
        else:
            yield from (Recorded(name, sample.name, dtype, launch) for launch in found)
