"""Products with 4-bit weights: as close to the truth over the dequantised weight as stock PyTorch with that weight."""

import pytest
import torch
from tests.support.ttir import accesses

from fuselora.functional import dequantize_4bit, linear_4bit, quantize_4bit
from fuselora.kernels import matmul_4bit, nf4
from fuselora.kernels.gpu import aot, nf4_plan
from fuselora.kernels.gpu.launch import interpreting, record
from fuselora.kernels.numerics import K_REDUCTION
from fuselora.kernels.registry import OPS
from fuselora.testing import assert_kernel_close, saved_bytes

META = torch.device("meta")
interpreted = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(interpreting(), reason="under TRITON_INTERPRET nothing is compiled")


def check_products(linear, x, q, bias):
    """y, dx and dbias of ``linear(x, q, bias)``."""
    w = dequantize_4bit(q, x.dtype)
    dy = torch.randn(*x.shape[:-1], q.shape[0]).to(x.dtype)

    def run(fn, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, bias)]
        y = fn(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy.to(dtype))

    ours = run(lambda a, b: linear(a, q, b), x.dtype)
    stock = run(lambda a, b: torch.nn.functional.linear(a, w, b), x.dtype)
    truth = run(lambda a, b: torch.nn.functional.linear(a, w.double(), b), torch.float64)
    for name, a, b, c in zip(("y", "dx", "dbias"), ours, truth, stock, strict=True):
        assert_kernel_close(a.detach(), b, c, name=name, k=K_REDUCTION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 24, 64), (5, 130, 128), (17, 64, 192), (33, 40, 64), (3, 7, 88)], ids=str)
@pytest.mark.parametrize("blocksize, double", [(64, True), (32, False), (4096, False)])
def test_products_with_real_weights(shape, blocksize, double, dtype):
    m, n, k = shape
    q = quantize_4bit(torch.randn(n, k) * k**-0.5, "nf4", blocksize, double)
    check_products(linear_4bit, torch.randn(m, k).to(dtype), q, torch.randn(n).to(dtype))


def test_strides_of_activations_and_gradients():
    q = quantize_4bit(torch.randn(48, 64), double=True)
    check_products(linear_4bit, torch.randn(64, 6).t(), q, torch.randn(48))
    check_products(linear_4bit, torch.randn(2, 3, 64), q, torch.randn(48))
    x = torch.randn(5, 64, requires_grad=True)
    linear_4bit(x, q).sum().backward()  # a gradient without strides
    torch.testing.assert_close(x.grad, dequantize_4bit(q, torch.float32).sum(0).expand(5, 64))


def test_nothing_but_the_4_bit_weight_is_kept():
    q = quantize_4bit(torch.randn(96, 128), double=True)
    x = torch.randn(3, 128, requires_grad=True)
    parts = (q.data, q.absmax, q.code, q.absmax2, q.code2, q.offset)
    assert saved_bytes(lambda: linear_4bit(x, q)) == sum(t.untyped_storage().nbytes() for t in parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(x=torch.zeros(3, 65)), r"x.shape\[-1\]: expected 64"),
        (dict(x=torch.zeros(3, 64, dtype=torch.int32)), "x.dtype: expected fp32"),
        (dict(bias=torch.zeros(47)), r"bias.shape\[0\]: expected 48"),
        (dict(bias=torch.zeros(48, dtype=torch.bfloat16)), "bias.dtype: expected one of torch.float32"),
        (dict(q=quantize_4bit(torch.zeros(48, 64))._replace(shape=(48, 128))), "data: expected 3072"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    given = dict(x=torch.zeros(3, 64), q=quantize_4bit(torch.zeros(48, 64)), bias=None) | change
    with pytest.raises(ValueError, match=f"linear_4bit: {said}"):
        linear_4bit(**given)


def operands(m, n, k, transpose, dtype=torch.bfloat16, double=True, device=META):
    q = nf4.random_weight(dtype, device, (n, k), "nf4", 64, double)
    x = torch.empty(m, n if transpose else k, dtype=dtype, device=device)
    return x, *q.operands(), None, transpose


@compiled
@pytest.mark.parametrize(
    "capability, dtype, most",
    [(80, "bfloat16", 64), (86, "float16", 128), (89, "bfloat16", 256), (90, "bfloat16", 64), (120, "float32", 16)],
)
def test_the_table_predicts_where_fused_products_end(capability, dtype, most):
    supports = OPS["matmul_4bit"].impls["triton"].supports
    with record(capability):
        assert supports(*operands(most, 128, 128, False, getattr(torch, dtype))) is None
        assert "above the fused threshold" in supports(*operands(most + 1, 128, 128, False, getattr(torch, dtype)))
        assert supports(*operands(1, 128, 88, False)) == "K is not a multiple of 64"
    with record(75):
        assert "tensor cores" in supports(*operands(1, 128, 128, False))


@pytest.mark.parametrize("transpose", [False, True])
def test_plans_cover_the_reduced_dimension_and_write_less_than_the_weight(transpose):
    for m in (0, 1, 16, 33, 64, 256):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 2880), (1000, 64), (8, 64)):
            x, width, depth = torch.empty(m, 1, device=META, dtype=torch.bfloat16), *((k, n) if transpose else (n, k))
            with record(90):
                plan = nf4_plan.plan(x, n, k, transpose)
            part = plan.steps * plan.red_block(transpose)
            assert (plan.splits - 1) * part < depth <= plan.splits * part
            assert 2 * plan.partial_bytes(m, width) <= n * k / 2
            assert plan.splits == 1 or plan.steps >= nf4_plan.STEPS
            assert k % (8 * plan.words) == 0


@interpreted
@pytest.mark.parametrize("transpose", [False, True])
def test_split_products_equal_whole_ones(transpose):
    """Sums of eighths below 2^8 are exact in any order."""
    q = matmul_4bit.exact_weight(torch.device("cpu"), (264, 256), 64, False)
    x = torch.randint(-2, 3, (2, 264 if transpose else 256)).float()
    bias = None if transpose else torch.ones(264)
    assert nf4_plan.plan(x, 264, 256, transpose).splits > 1
    ours = OPS["matmul_4bit"].impls["triton"].fn(x, *q.operands(), bias, transpose)
    w = dequantize_4bit(q, torch.float32)
    assert torch.equal(ours, x @ w if transpose else x @ w.t() + 1)


@compiled
def test_hopper_takes_forward_weights_from_registers():
    with record(90) as launches:
        OPS["matmul_4bit"].impls["triton"].fn(*operands(16, 4096, 4096, False))
    assert len(launches) == 2
    made = aot.compile_launch(launches[0], 90).asm["ttgir"]
    (dot,) = [line for line in made.splitlines() if "warp_group_dot " in line]
    assert "#ttg.dot_op<{opIdx = 0" in dot


@compiled
@pytest.mark.parametrize("transpose", [False, True])
def test_weights_of_2_to_the_32_elements(transpose):
    with record(90) as launches:
        OPS["matmul_4bit"].impls["triton"].fn(*operands(64, 2**20, 4096, transpose))
    for launch in launches:
        touched = accesses(aot.compile_launch(launch, 90).asm["ttir"], launch.args, launch.grid)
        assert touched.overflows == []
