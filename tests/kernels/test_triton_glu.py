"""The Triton GLU kernels where the contract's random inputs do not go: saturated gates, halves read in place, 2^31."""

import pytest
import torch

from fuselora.kernels import glu as module
from fuselora.kernels.glu import ACTIVATIONS
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.testing import assert_kernel_close, poisoned_empty

pytest.importorskip("triton")
from fuselora.kernels.gpu import glu as kernels  # noqa: E402

interpreted = pytest.mark.skipif(not interpreting(), reason="runs in Triton's interpreter: set TRITON_INTERPRET=1")
recorded = pytest.mark.skipif(interpreting(), reason="records launches: unset TRITON_INTERPRET")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_saturated_gates(act, dtype):
    """+-100, +-1e4: sigmoid is 0 or 1, exponentials and cubes leave fp32's range; every element by itself is exact."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e4]], dtype=dtype)
    up, dh = torch.full_like(gate, 0.5), torch.full_like(gate, -0.25)
    ours = (kernels.glu(gate, up, act), *kernels.glu_bwd(dh, gate, up, act, True))
    wide = [t.double() for t in (dh, gate, up)]
    truth = (module._reference(*wide[1:], act), *module._reference_bwd(*wide, act, True))
    tiny = max(torch.finfo(dtype).tiny, 1e4 * 2.0**-126)  # a sigmoid below 2^-126 counts as 0, times the largest gate
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4 * torch.finfo(dtype).eps, atol=tiny)


@interpreted
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gates_of_any_size_stay_finite(act):
    gate = torch.logspace(-38, 38, 512).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    one = torch.ones_like(gate)
    h, (dgate, dup, _) = kernels.glu(gate, one, act), kernels.glu_bwd(one, gate, one, act, False)
    assert h.isfinite().all() and dgate.isfinite().all() and dup.isfinite().all()


@interpreted
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_grid_of_several_tiles_each_way(act):
    gate, up, dh = (torch.randn(5, 1030) for _ in range(3))
    with poisoned_empty():
        ours = (kernels.glu(gate, up, act), *kernels.glu_bwd(dh, gate, up, act, True))
    wide = [t.double() for t in (dh, gate, up)]
    truth = (module._reference(*wide[1:], act), *module._reference_bwd(*wide, act, True))
    stock = (module._reference(gate, up, act), *module._reference_bwd(dh, gate, up, act, True))
    for a, b, c in zip(ours, truth, stock, strict=True):
        assert_kernel_close(a, b, c)


@interpreted
def test_halves_are_written_in_place_and_nothing_beside_them():
    packed, dh = torch.randn(6, 40), torch.randn(6, 1).expand(6, 20)
    (dgate_up, h), (dgate, dup, again) = (
        kernels.glu_packed_bwd(dh, packed, "silu", True),
        kernels.glu_bwd(dh, *packed.chunk(2, -1), "silu", True),
    )
    assert torch.equal(dgate_up, torch.cat((dgate, dup), -1)) and torch.equal(h, again)


@recorded
def test_halves_are_read_where_they_are():
    packed = torch.empty(64, 4096, device="meta", dtype=torch.bfloat16)
    gate, up = packed.chunk(2, -1)
    with record() as launches:
        kernels.glu(gate, up, "silu")
        kernels.glu_bwd(torch.empty(64, 2048, device="meta", dtype=torch.bfloat16), gate, up, "silu", False)
    for launch in launches:
        assert launch.args["gate_stride"] == launch.args["up_stride"] == 4096
        assert launch.args["gate_ptr"]._base is packed and launch.args["up_ptr"]._base is packed
        assert launch.args["h_ptr"] is None or launch.kernel.__name__ == "_glu"


@recorded
def test_the_grid_reaches_the_last_of_more_than_2_to_the_31_elements():
    gate = torch.empty(2**21 + 1, 1040, device="meta", dtype=torch.bfloat16)
    with record() as launches:
        kernels.glu(gate, gate, "silu")
    (launch,) = launches
    rows, cols = launch.args["ROWS"], launch.args["COLS"]
    assert gate.numel() > 2**31 and launch.grid[0] < 2**31
    assert launch.grid[0] == -(-gate.shape[0] // rows) * -(-gate.shape[1] // cols)
