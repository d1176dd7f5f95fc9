"""LayerNorm beyond the contract: mixed dtypes, statistics kept in fp32, what is saved, mutations, errors."""

import pytest
import torch

from fuselora.functional import layer_norm
from fuselora.kernels import layer_norm as module
from fuselora.kernels.registry import FUNCTIONS
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
