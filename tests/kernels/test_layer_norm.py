"""LayerNorm beyond the contract: mixed dtypes, statistics kept in fp32, what is saved, mutations, errors."""

import pytest
import torch

from fuselora.functional import layer_norm
from fuselora.kernels import layer_norm as module
from fuselora.kernels import native
from fuselora.kernels.registry import FUNCTIONS, Sample
from fuselora.testing import assert_function_close, saved_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(23)


def test_gradcheck():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (7,), (7,)))
    torch.autograd.gradcheck(layer_norm, (x, weight, bias))


def test_fp32_weight_beside_bf16_activations():
    x = torch.randn(5, 24).bfloat16().requires_grad_()
    weight, bias = torch.randn(24, requires_grad=True), torch.randn(24, requires_grad=True)
    y = layer_norm(x, weight, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("weight", [None, torch.ones(24).bfloat16()])
def test_statistics_are_fp32_for_bf16(weight):
    x = torch.randn(5, 24).bfloat16()
    _, mean, rstd = torch.ops.fuselora.layer_norm(x, weight, None, 1e-5)
    torch.testing.assert_close(mean, x.float().mean(-1))
    torch.testing.assert_close(rstd, (x.float().var(-1, correction=0) + 1e-5).rsqrt())


def test_saves_input_and_two_numbers_a_row():
    x, weight = torch.randn(6, 24).bfloat16().requires_grad_(), torch.randn(24).bfloat16()
    assert saved_bytes(lambda: layer_norm(x, weight)) == 6 * 24 * 2 + 24 * 2 + 2 * 6 * 4


def test_frozen_parameters_get_no_gradient():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    layer_norm(x, weight, weight).sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_from_zero_obey_the_numerics_rule(dtype, offset):
    """Where E[x^2] - E[x]^2 cancels, or a mean that was rounded once too often shows."""
    x = (offset + torch.randn(300, 1000)).to(dtype).requires_grad_()
    weight, bias = (torch.randn(1000, dtype=dtype, requires_grad=True) for _ in range(2))
    assert_function_close(FUNCTIONS["layer_norm"], Sample(f"offset {offset}", (x, weight, bias)))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e6 + 0.3])
def test_a_constant_row_is_the_bias(value):
    x, bias = torch.full((3, 77), value), torch.randn(77)
    y, mean, rstd = torch.ops.fuselora.layer_norm(x, None, bias, 1e-5)
    assert torch.equal(mean, x[:, 0])
    torch.testing.assert_close(y, bias.expand(3, 77))
    torch.testing.assert_close(rstd, torch.full((3,), 1e-5).rsqrt())


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_native_ops_take_what_they_say():
    x, half, double = torch.randn(4, 8), torch.randn(8).half(), torch.randn(8).double()
    assert module._cpu_supports(x, half, half.bfloat16(), 1e-5) is None
    assert "float64" in module._cpu_supports(x, None, double, 1e-5)
    assert "empty" in module._cpu_supports(torch.randn(4, 0), None, None, 1e-5)
    row = torch.ones(4)
    assert "gradient is torch.float16" in module._cpu_bwd_supports(x.half(), x, half, row, row, True, True)
    assert module._cpu_bwd_supports(x, x, half, row, row, True, True) is None


def mean_not_subtracted(dy, x, weight, mean, rstd, need_dw, need_db):
    return RIGHT(dy, x, weight, torch.zeros_like(mean), rstd, need_dw, need_db)


def weight_forgotten(dy, x, weight, mean, rstd, need_dw, need_db):
    return RIGHT(dy, x, None, mean, rstd, need_dw, need_db)


def scale_dropped(dy, x, weight, mean, rstd, need_dw, need_db):
    return RIGHT(dy, x, weight, mean, torch.ones_like(rstd), need_dw, need_db)


RIGHT = module.LAYER_NORM_BWD.reference


@pytest.mark.parametrize("wrong", [mean_not_subtracted, weight_forgotten, scale_dropped])
def test_a_wrong_backward_is_caught(monkeypatch, wrong):
    monkeypatch.setenv("FUSELORA_IMPL", "*=reference")
    monkeypatch.setattr(module.LAYER_NORM_BWD, "reference", wrong)
    record = FUNCTIONS["layer_norm"]
    sample = next(s for s in record.samples(torch.bfloat16, CPU) if s.name == "(2, 5, 96)-trained")
    with pytest.raises(AssertionError, match="gradient of input"):
        assert_function_close(record, sample)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 4).long(),), "layer_norm: x.dtype"),
        ((torch.zeros(2, 4), torch.zeros(5)), r"layer_norm: weight.shape\[0\]: expected 4"),
        ((torch.zeros(2, 4), None, torch.zeros(1, 4)), r"layer_norm: bias.dim\(\)"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(*args)
