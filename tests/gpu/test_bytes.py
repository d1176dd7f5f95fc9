"""The byte model: what each op's record says must travel is what its launches read and write.

The bytes behind a launch are those of its distinct buffers, once if the kernel loads from them and once if it stores to
them, which its IR tells. PyTorch operations inside a launcher (cuBLAS GEMMs) count their operands and results.
"""

import pytest
import torch
from launches import Event, counting, distinct_bytes
from tests.support.recorded import META, MULTIPROCESSORS, triton_ops
from tests.support.ttir import accesses

from fuselora.kernels.gpu import aot, choices
from fuselora.kernels.gpu.launch import interpreting
from fuselora.kernels.registry import OPS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")

CAPABILITY = 90
TOLERANCE = 0.02  # vectors such as norm weights may be left out of a model
# Tensors that kernels reach through a table of addresses, each as often as it travels; from the op's arguments.
BEHIND_ADDRESSES = {
    "adamw_": lambda params, grads, *rest: [*params, *params, *grads, *grads, *rest[-1]],
}


@pytest.fixture(autouse=True)
def one_gemm(monkeypatch):
    """Records of the LoRA GEMMs state what must travel: that of one GEMM which takes the low-rank part in. A library
    GEMM per weight reads X again and adds to what it has written; kernels/gpu/lora_matmul.py counts that."""
    monkeypatch.setenv(choices.ENV_GEMM, "triton")


@pytest.mark.parametrize("name", triton_ops())
def test_the_cost_of_an_op_is_what_its_launches_move(name):
    op, checked, wrong = OPS[name], 0, []
    for sample in op.workloads(torch.bfloat16, META):
        with counting(CAPABILITY, MULTIPROCESSORS[CAPABILITY], keep=True) as counter:
            if op.impls["triton"].supports(*sample.args):
                continue
            getattr(torch.ops.fuselora, name)(*sample.args)
            stated = op.cost(*sample.args).bytes
        checked += 1
        found = {event.name: moved(event) for event in counter.events}
        total = sum(moved(event) for event in counter.events)
        total += sum(map(distinct_bytes, BEHIND_ADDRESSES.get(name, lambda *args: [])(*sample.args)))
        if abs(stated - total) > TOLERANCE * total:
            wrong.append(f"{name}[{sample.name}]: cost says {stated:,} bytes, the launches move {total:,}: {found}")
    assert checked, f"{name}: no workload runs on Triton"
    assert wrong == [], "\n".join(wrong)


def moved(event: Event) -> int:
    """Bytes that one launch reads and writes."""
    launch = event.launch
    if launch is None:
        return event.bytes
    touched = accesses(aot.compile_launch(launch, CAPABILITY).asm["ttir"], launch.args, launch.grid)
    return sum(
        distinct({identity(launch.args[n]): launch.args[n] for n in names}) for names in (touched.loads, touched.stores)
    )


def identity(t: torch.Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def distinct(tensors: dict) -> int:
    return sum(distinct_bytes(t) for t in tensors.values())
