"""Tensors of more than 2^31 elements: no address of any Triton kernel is computed in 32 bits where it could overflow.

A workload is stretched along its rows until its largest tensor has 2^32 elements (on the meta device, so nothing is
allocated), the launches are recorded, and their IR is interpreted over the ranges that its integers can have. See
tests/support/ttir.py.
"""

import math

import pytest
import torch
from tests.support.recorded import META, launches, triton_ops
from tests.support.ttir import accesses
from torch.utils._pytree import tree_leaves, tree_map

from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import interpreting
from fuselora.kernels.registry import OPS, Sample

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")

CAPABILITY = 90
ELEMENTS = 2**32


def tensors(sample: Sample) -> list[torch.Tensor]:
    return [t for t in tree_leaves(sample.args) if isinstance(t, torch.Tensor)]


def stretched(sample: Sample) -> Sample | None:
    """The sample with ELEMENTS elements in its largest tensor. Its rows are the largest dimension of that tensor but
    the last; None if another tensor's last dimension is as long, so that rows could not be told from columns."""
    largest = max(tensors(sample), key=torch.Tensor.numel)
    rows = max(largest.shape[:-1] or largest.shape)
    if any(t.ndim > 1 and t.shape[-1] == rows for t in tensors(sample)):
        return None
    many = -(-ELEMENTS // (largest.numel() // rows))

    def stretch(x):
        if not isinstance(x, torch.Tensor) or x.device != META:  # a seed is on the CPU
            return x
        return torch.empty([many if size == rows else size for size in x.shape], dtype=x.dtype, device=META)

    return Sample(sample.name, tree_map(stretch, sample.args))


@pytest.mark.parametrize("name", triton_ops())
def test_addresses_are_computed_in_64_bits(name):
    seen, overflows, largest = set(), [], 0
    for sample in filter(None, map(stretched, OPS[name].workloads(torch.bfloat16, META))):
        found = launches(OPS[name], sample, CAPABILITY)
        if isinstance(found, str):
            continue
        for launch in found:
            sizes = [math.prod(v.shape) for v in launch.args.values() if isinstance(v, torch.Tensor)]
            largest = max(largest, *sizes)
            if (key := aot.same_kernel(launch)) in seen:
                continue
            seen.add(key)
            touched = accesses(aot.compile_launch(launch, CAPABILITY).asm["ttir"], launch.args, launch.grid)
            overflows += [f"{name}[{sample.name}] {launch.kernel.__name__}: {text}" for text in touched.overflows]
    assert largest >= 2**31, f"{name}: no workload could be stretched, its largest buffer has {largest} elements"
    assert overflows == [], "\n".join(overflows)


@pytest.mark.parametrize("rows, broken", [(1024, 0), (2**20, 1)])
def test_the_check_sees_an_overflow(rows, broken):
    """A matrix addressed by i32 row * i32 stride."""
    ir = """
module {
  tt.func public @f(%p: !tt.ptr<f32>, %stride: i32) attributes {noinline = false} {
    %c128_i32 = arith.constant 128 : i32 loc(#loc1)
    %0 = tt.get_program_id x : i32 loc(#loc2)
    %1 = arith.muli %0, %c128_i32 : i32 loc(#loc2)
    %2 = tt.make_range {end = 128 : i32, start = 0 : i32} : tensor<128xi32> loc(#loc2)
    %3 = tt.splat %1 : i32 -> tensor<128xi32> loc(#loc2)
    %4 = arith.addi %3, %2 : tensor<128xi32> loc(#loc2)
    %5 = tt.splat %stride : i32 -> tensor<128xi32> loc(#loc2)
    %6 = arith.muli %4, %5 : tensor<128xi32> loc(#loc2)
    %7 = tt.splat %p : !tt.ptr<f32> -> tensor<128x!tt.ptr<f32>> loc(#loc2)
    %8 = tt.addptr %7, %6 : tensor<128x!tt.ptr<f32>>, tensor<128xi32> loc(#loc2)
    %9 = tt.load %8 : tensor<128x!tt.ptr<f32>> loc(#loc2)
    tt.store %8, %9 : tensor<128x!tt.ptr<f32>> loc(#loc2)
    tt.return loc(#loc2)
  } loc(#loc)
}
"""
    touched = accesses(ir, {"p": torch.empty(0, device=META), "stride": 4096}, (rows // 128,))
    assert (touched.loads, touched.stores) == ({"p"}, {"p"})
    assert len(touched.overflows) == broken
