"""fp32 adapters on a low-precision base, PEFT's default: what splitting them in two parts buys."""

import pytest
import torch

from fuselora.functional import LoRA, lora_delta, lora_linear
from fuselora.kernels import lora_linear as module
from fuselora.kernels.numerics import K_REDUCTION, compare, rounding

M, K, N, R = 8192, 32, 24, 4


def adapters(dtype=torch.float32):
    torch.manual_seed(3)
    return LoRA(torch.randn(R, K, dtype=dtype), torch.randn(N, R, dtype=dtype), 2.0)


def systematic_error(dtype: torch.dtype) -> float:
    """Relative error of the weight that the adapter really applies, fitted over many tokens: rounding noise, which
    differs from token to token, averages out; an error of A or B does not."""
    lora = adapters()
    x = torch.randn(M, K).to(dtype)
    y = lora_linear(x, torch.zeros(N, K, dtype=dtype), None, lora)
    applied = torch.linalg.lstsq(x.double(), y.double()).solution.T
    truth = lora.scaling * lora.b.double() @ lora.a.double()
    return float((applied - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_split_adapters_apply_the_fp32_weight(dtype, monkeypatch):
    split = systematic_error(dtype)
    prepare = module.prepare_lora
    monkeypatch.setattr(module, "prepare_lora", lambda *args: prepare(*args)._replace(split=False))
    rounded = systematic_error(dtype)
    assert split < rounding(dtype) / 4, f"{split:.2e}"
    assert rounded > 2 * split, f"without the split {rounded:.2e}, with it {split:.2e}"


@pytest.mark.parametrize("op", ["linear", "delta"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp32_adapters_on_a_bf16_base(op, p):
    """Outputs and gradients against fp64, next to stock, which casts the input to fp32. The GEMMs run in bf16, so one
    rounding is one of bf16 in the gradients of the fp32 adapters too."""
    torch.manual_seed(5)
    x = torch.randn(257, K).bfloat16()
    weight, upstream = (torch.randn(N, K) * K**-0.5).bfloat16(), torch.randn(257, N).bfloat16()
    seed = torch.tensor(11)

    def run(dtype, ours):
        a, b = (t.to(dtype or t.dtype).requires_grad_() for t in adapters()[:2])
        xi, w = (t.to(dtype or t.dtype).requires_grad_() for t in (x, weight))
        lora = LoRA(a, b, 2.0, p, None, seed)
        if not ours:
            y = module.eager_projection(xi, module.Projection(w, None, lora))
        elif op == "linear":
            y = lora_linear(xi, w, None, lora)
        else:
            y = lora_delta(torch.nn.functional.linear(xi, w), xi, lora)
        grads = torch.autograd.grad(y, (xi, w, a, b), upstream.to(y.dtype))
        return [y.detach(), *grads]

    for name, ours, stock, truth in zip(
        ("y", "dx", "dw", "da", "db"), run(None, True), run(None, False), run(torch.float64, False), strict=True
    ):
        assert ours.dtype == stock.dtype, name
        for error in compare(ours, truth, stock):
            bound = K_REDUCTION * error.stock + 2 * rounding(torch.bfloat16) * error.scale
            assert error.ours <= bound, f"{name}: {error}"


def test_autocast_rounds_adapters_as_stock_does():
    lora = adapters()
    x, weight = torch.randn(33, K), torch.randn(N, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = lora_linear(x, weight, None, lora)
        stock = module.eager_projection(x, module.Projection(weight, None, lora))
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), stock.float(), rtol=2**-6, atol=2**-6 * float(stock.abs().max()))


@pytest.mark.parametrize("shape", [(5, K), (2, 5, K)], ids=str)
def test_outputs_may_be_changed_in_place(shape):
    """Stock's linear outputs may; a view returned by an autograd Function may not."""
    x = torch.randn(shape, requires_grad=True)
    y = lora_linear(x, torch.randn(N, K), None, adapters())
    y += 1
    z = lora_delta(torch.randn(*shape[:-1], N), x, adapters())
    z *= 2
    (y.sum() + z.sum()).backward()
    assert torch.isfinite(x.grad).all()
