"""The Triton candidate of the LoRA GEMMs, which the choice table picks on few architectures, compiled ahead of time for
all that it may be measured on. The central tests compile what the table picks."""

import pytest
import torch
from tests.support.recorded import META, MULTIPROCESSORS
from tests.support.ttir import accesses

from fuselora.kernels import lora_samples
from fuselora.kernels.gpu import aot
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.registry import OPS

pytest.importorskip("triton")

from fuselora.kernels.gpu import lora_augmented, lora_matmul  # noqa: E402
from fuselora.kernels.gpu.lora_gemm_launch import aligned, default_config  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")
ARCHITECTURES = [capability for capability in aot.ARCHITECTURES if capability >= 80]
INSTRUCTION = {90: r"HGMMA", 100: r"UTC\w*MMA"}  # elsewhere HMMA
WORKLOADS = ("llama3-8b-qkv", "llama3-8b-down", "awkward")
BF16 = torch.bfloat16


def launches(name, capability, *, m=None, dtype=BF16, adapters=torch.float32):
    """What the candidate launches for both ops on one workload, with the ops' arguments."""
    group = lora_samples.WORKLOADS[name]
    t = lora_samples.tensors(group._replace(m=m or group.m), dtype, META, adapters)
    for op, run, pick in (
        ("lora_project", lora_matmul.project_triton, lora_samples.project),
        ("lora_grad_x", lora_matmul.grad_x_triton, lora_samples.grad_x),
    ):
        left = [t.x] if op == "lora_project" else t.dys
        rows_aligned = aligned([*left, *t.weights], [w.shape[0] for w in t.weights])
        with record(capability, MULTIPROCESSORS[capability]) as recorded:
            run(*pick(t), default_config(capability, dtype, t.x.shape[0], rows_aligned))
        yield op, pick(t), recorded


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_no_spills_wide_accesses_and_tensor_cores(name, capability):
    for op, _, recorded in launches(name, capability):
        for launch in recorded:
            used = aot.resources(launch, capability)
            where = f"{op}[{name}] on sm_{capability}: {used.registers} registers, {used.shared} bytes"
            assert used.spills == 0, where
            assert used.shared <= aot.MULTIPROCESSORS[capability].shared_per_block, where
            assert used.count(INSTRUCTION.get(capability, "HMMA")) > 0, where
            if name != "awkward":  # odd widths: the elements one by one
                assert used.count(r"STG\S*\.128") == used.count("STG") > 0, where
                assert used.count(r"LDGSTS\S*\.128") == used.count("LDGSTS") > 0, where


@pytest.mark.parametrize("name", ["llama3-8b-qkv", "llama3-8b-gate-up", "llama3-8b-down", "qwen3-0.6b-qkv"])
def test_the_launch_moves_the_bytes_that_the_op_states(name):
    for op, args, (launch,) in launches(name, 90):
        moved = sum(v.numel() * v.element_size() for v in launch.args.values() if isinstance(v, torch.Tensor))
        assert moved == OPS[op].cost(*args).bytes


@pytest.mark.parametrize("rows", [4096, 2**20])
def test_addresses_are_computed_in_64_bits(rows):
    for _, _, recorded in launches("llama3-8b-down", 90, m=rows):
        for launch in recorded:
            ir = aot.compile_launch(launch, 90).asm["ttir"]
            assert accesses(ir, launch.args, launch.grid).overflows == []


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("adapters", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_packing_the_augmented_gemm(capability, adapters):
    m, k, widths, split = 4096, 4096, (4096, 1024, 1024), adapters == torch.float32
    spare = lora_augmented.room((16, 16, 16), split)
    x, w = (torch.empty(rows, k + spare, dtype=BF16, device=META) for rows in (m, sum(widths)))
    s = torch.empty(m, 48, dtype=BF16, device=META)
    b = [torch.empty(n, 16, dtype=adapters, device=META) for n in widths]
    with record(capability) as recorded:
        ys = lora_augmented.project_augmented(x, w, k, widths, s, b, [2.0] * 3, split)
    assert [y.shape for y in ys] == [(m, n) for n in widths]
    (launch,) = recorded
    assert aot.resources(launch, capability).spills == 0
