"""Native GLU: values at the edges as in torch, accuracy of exp, tanh and the normal distribution, strides, threads."""

import math

import pytest
import torch

from fuselora.kernels import glu as module
from fuselora.kernels import native
from fuselora.testing import poisoned_empty

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 6e-8, -6e-8, 1e-5, 88.7, 88.8, -88.7, -104.0, 300.0, -300.0]
EDGES += [6e4, -6e4, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", module.ACTIVATIONS)
def test_edge_values_are_torch_s(act, dtype):
    gate = torch.tensor(EDGES, dtype=dtype)
    ones = torch.ones_like(gate)
    h, (dgate, dup, again) = module._cpu(gate, ones, act), module._cpu_bwd(ones, gate, ones, act, True)
    stock, stock_dgate = module._reference(gate, ones, act), module._reference_bwd(ones, gate, ones, act, False)[0]
    if act == "gelu":
        stock[gate == torch.inf] = torch.inf  # torch's vectorised erf gives NaN there
    tolerance = {"rtol": 16 * 2**-24 if dtype == torch.float32 else torch.finfo(dtype).eps, "equal_nan": True}
    torch.testing.assert_close(h, stock, atol=torch.finfo(dtype).tiny, **tolerance)
    torch.testing.assert_close(dgate, stock_dgate, atol=torch.finfo(dtype).tiny, **tolerance)
    assert torch.equal(dup.nan_to_num(7), h.nan_to_num(7)) and torch.equal(again.nan_to_num(7), h.nan_to_num(7))


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest, in units of 2^-24."""
    return ((ours.double() - truth) / truth).abs().max().item() * 2**24


def test_silu_is_accurate_everywhere():
    gate = torch.linspace(-87, 87, 300_000)
    ones = torch.ones_like(gate)
    assert relative_error(module._cpu(gate, ones, "silu"), gate.double() * gate.double().sigmoid()) < 6


def test_gelu_keeps_its_lower_tail():
    """1 + erf loses it: stock is 30 % off at -5. The factor is the rounding of x^2 / 2 in front of exp."""
    gate = torch.linspace(-13, 13, 300_000)
    exact = gate.double() * torch.special.erfc(gate.double() / -math.sqrt(2)) / 2
    error = ((module._cpu(gate, torch.ones_like(gate), "gelu").double() - exact) / exact).abs() * 2**24
    assert (error < 8 + gate.double().square()).all()


def test_known_answers():
    one = torch.ones(1)
    assert module._cpu(one, one, "silu").item() == pytest.approx(1 / (1 + math.exp(-1)), rel=2e-7)
    assert module._cpu(one, one, "gelu").item() == pytest.approx(0.8413447460685429, rel=2e-7)
    inner = math.sqrt(2 / math.pi) * 1.044715
    assert module._cpu(one, one, "gelu_tanh").item() == pytest.approx(0.5 * (1 + math.tanh(inner)), rel=2e-7)


@pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_are_read_and_written_in_place(dtype, cols):
    packed, dh = torch.randn(5, 2 * cols, dtype=dtype), torch.randn(5, cols, dtype=dtype)
    gate, up = (x.contiguous() for x in packed.chunk(2, -1))
    assert torch.equal(module._cpu(*packed.chunk(2, -1), "silu"), module._cpu(gate, up, "silu"))
    with poisoned_empty():
        dpacked, h = module._cpu_packed_bwd(dh, packed, "silu", True)
        dgate, dup, same = module._cpu_bwd(dh, gate, up, "silu", True)
    assert torch.equal(dpacked, torch.cat((dgate, dup), -1)) and torch.equal(h, same)


def test_strides_that_fit_cost_no_copy():
    packed = torch.randn(6, 80)
    for x in (packed[:, :40], packed[:, 40:], packed[::2], packed[:1, :40].expand(6, 40)):
        assert module._strided(x).data_ptr() == x.data_ptr()
    assert module._strided(packed.t()).is_contiguous()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_threads(threads):
    gate, up, dh = (torch.randn(77, 2050).bfloat16() for _ in range(3))

    def run():
        return module._cpu(gate, up, "gelu"), *module._cpu_bwd(dh, gate, up, "gelu", True)

    was = torch.get_num_threads()
    torch.set_num_threads(1)
    one = run()
    torch.set_num_threads(threads)
    many = run()
    torch.set_num_threads(was)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_reasons_and_bad_arguments():
    x = torch.zeros(2, 4, dtype=torch.float64)
    assert "not torch.float64" in module._cpu_supports(x, x, "silu")
    assert "differ" in module._cpu_supports(x.float(), x, x, "silu", False)
    assert module._cpu_supports(x[:0].float(), x[:0].float(), "silu") == "an empty dimension"
    with pytest.raises(RuntimeError, match="glu: bad argument: rows 1, cols 1, dtype 0, act 9"):
        native.call("fuselora_glu", None, None, None, 1, 1, 1, 1, 0, 9, 1)
