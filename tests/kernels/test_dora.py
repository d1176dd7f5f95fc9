"""DoRA: row norms where terms cancel, fp32 adapters on a bf16 base, what is saved and what is refused."""

import pytest
import torch

from fuselora.functional import LoRA, dora_linear
from fuselora.kernels.dora_linear import eager_dora_linear
from fuselora.kernels.numerics import K_REDUCTION, compare, rounding
from fuselora.testing import assert_kernel_close, saved_bytes

M, K, N, R = 257, 72, 40, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def adapter(dtype=torch.float32, p=0.0):
    seed = torch.tensor(11) if p else None
    return LoRA(torch.randn(R, K, dtype=dtype) * K**-0.5, torch.randn(N, R, dtype=dtype), 2.0, p, None, seed)


def stock_norm(weight, a, b, scaling):
    return torch.linalg.norm(weight.to(a.dtype) + scaling * (b @ a), dim=1)


def identity_norm(weight, a, b, scaling):
    """The expanded square: what must not be done."""
    weight = weight.to(a.dtype)
    cross, gram = (weight @ a.t() * b).sum(1), (b @ (a @ a.t()) * b).sum(1)
    return (weight.square().sum(1) + 2 * scaling * cross + scaling**2 * gram).clamp(min=0).sqrt()


@DTYPES
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4])
def test_norm_where_the_adapter_opposes_the_weight(dtype, left):
    """W = left * noise - s B A: of the size of ``left`` remains."""
    lora = adapter()
    weight = (left * torch.randn(N, K) - lora.scaling * (lora.b @ lora.a)).to(dtype)
    args = (weight, lora.a, lora.b, lora.scaling)
    truth = stock_norm(*(t.double() for t in args[:3]), lora.scaling)
    norm = torch.ops.fuselora.dora_norm(*args)
    assert_kernel_close(norm, truth, stock_norm(*args), k=K_REDUCTION)
    if left == 1e-4 and dtype == torch.float32:
        with pytest.raises(AssertionError):
            assert_kernel_close(identity_norm(*args), truth, stock_norm(*args), k=K_REDUCTION)


@DTYPES
def test_norm_with_adapters_of_the_weights_dtype(dtype):
    """Nothing is rounded on the way: as close to the truth as fp32 sums get, where stock rounds B A and the sum."""
    weight, (a, b, scaling, *_) = torch.randn(N, K).to(dtype), adapter(dtype)
    truth = stock_norm(weight.double(), a.double(), b.double(), scaling)
    torch.testing.assert_close(torch.ops.fuselora.dora_norm(weight, a, b, scaling).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp32_adapters_on_a_bf16_base(p):
    """Outputs and gradients against fp64, next to stock, which casts the input to fp32. Ours run GEMMs in bf16 and
    round S, dS, u and du to it: two roundings of bf16 beyond stock's error."""
    x, lora = torch.randn(M, K).bfloat16(), adapter(p=p)
    weight, bias = (torch.randn(N, K) * K**-0.5).bfloat16(), torch.randn(N).bfloat16()
    upstream = torch.randn(M, N).bfloat16()
    magnitude = stock_norm(weight, lora.a, lora.b, lora.scaling) * (1 + 0.2 * torch.randn(N))

    def run(function, dtype):
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias, lora.a, lora.b, magnitude)]
        xi, w, c, a, b, m = leaves
        y = function(xi, w, c, lora._replace(a=a, b=b), m)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    results = run(dora_linear, None), run(eager_dora_linear, None), run(eager_dora_linear, torch.float64)
    for name, ours, stock, truth in zip(("y", "dx", "dw", "dbias", "da", "db", "dm"), *results, strict=True):
        assert ours.dtype == stock.dtype, name
        for error in compare(ours, truth, stock):
            bound = K_REDUCTION * error.stock + 2 * rounding(torch.bfloat16) * error.scale
            assert error.ours <= bound, f"{name}: {error}"


def test_norm_is_a_constant_to_autograd():
    """y does not depend on the length of W + s B A; a gradient that knew it would be orthogonal to A where W = 0."""
    lora = adapter()
    lora = lora._replace(a=lora.a.requires_grad_(), b=lora.b.requires_grad_())
    y = dora_linear(torch.randn(M, K), torch.zeros(N, K), None, lora, torch.ones(N))
    (da,) = torch.autograd.grad(y.square().sum(), lora.a)
    assert (da * lora.a).sum() > 0.1 * da.norm() * lora.a.norm()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saved_for_backward(p):
    """x, S, u or z, the norm, parameters, the seed; without a trained magnitude no u."""
    x, lora = torch.randn(M, K).bfloat16().requires_grad_(), adapter(p=p)
    lora = lora._replace(a=lora.a.requires_grad_(), b=lora.b.requires_grad_())
    weight, magnitude = torch.randn(N, K).bfloat16(), torch.ones(N)
    parameters = 2 * N * K + 4 * R * (N + K) + 4 * N + 4 * N + (8 if p else 0)
    for trained in (False, True):
        m = magnitude.detach().requires_grad_(trained)
        saved = saved_bytes(lambda m=m: dora_linear(x, weight, None, lora, m))
        assert saved == 2 * M * (K + R + (N if trained else 0)) + parameters


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p):
    """Everything in the autocast dtype, the norm from the unrounded weights, gradients in the parameters' dtypes."""
    lora = adapter(p=p)
    x, weight, m = (t.requires_grad_() for t in (torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.ones(N)))
    truth = eager_dora_linear(x.double(), weight.double(), None, lora._replace(a=lora.a.double(), b=lora.b.double()), m)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dora_linear(x, weight, None, lora, m)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == m.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), truth, rtol=2**-6, atol=2**-6 * float(truth.detach().abs().max()))


def test_output_may_be_changed_in_place():
    x, m = torch.randn(2, 5, K, requires_grad=True), torch.ones(N, requires_grad=True)
    y = dora_linear(x, torch.randn(N, K), None, adapter(), m)
    y += 1
    y.sum().backward()
    assert torch.isfinite(m.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnitude": torch.ones(N, 1)}, r"dora_linear: magnitude.dim\(\): expected 1, got 2"),
        ({"magnitude": torch.ones(K)}, r"dora_linear: magnitude.shape\[0\]: expected 40, got \(72,\)"),
        ({"lora": adapter()._replace(bias=torch.ones(N))}, "dora_linear: lora.bias: expected None, got"),
        ({"lora": adapter()._replace(p=1.0)}, "dora_linear: layer.lora.p: expected 0.0 <= "),
    ],
)
def test_bad_arguments_get_one_sentence(change, message):
    arguments = {"x": torch.randn(3, K), "weight": torch.randn(N, K), "bias": None, "lora": adapter()}
    with pytest.raises(ValueError, match=message):
        dora_linear(**{**arguments, "magnitude": torch.ones(N), **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_initialisation_it_is_the_plain_layer_to_the_last_bit(dtype):
    """PEFT starts with B = 0 and the magnitudes at the norms."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 130).to(dtype), torch.randn(70, 130).to(dtype), torch.randn(70).to(dtype)
    a, b = torch.randn(4, 130).to(dtype), torch.zeros(70, 4).to(dtype)
    magnitude = torch.ops.fuselora.dora_norm(weight, a, b, 2.0)
    plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(dora_linear(x, weight, bias, LoRA(a, b, 2.0), magnitude), plain)
