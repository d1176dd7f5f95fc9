"""Under TRITON_INTERPRET every op with a Triton implementation really runs it: no sample is quietly left to another."""

import pytest
import torch

import fuselora.functional  # noqa: F401  (imports every kernel file, which fills the registry)
from fuselora.kernels.gpu.launch import interpreting
from fuselora.kernels.registry import OPS

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

# (op, why Triton refuses some of its samples)
REFUSED = {
    ("cross_entropy_rows", "an empty dimension"),
    ("cross_entropy_rows_bwd", "an empty dimension"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if "triton" in op.impls))
def test_triton_takes_every_sample(name, dtype):
    op = OPS[name]
    for sample in op.samples(dtype, torch.device("cpu")):
        reason = op.impls["triton"].supports(*sample.args)
        assert reason is None or (name, reason) in REFUSED, sample.name
        if reason is None:
            assert op.select("CPU", sample.args) is op.impls["triton"].fn
