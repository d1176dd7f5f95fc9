"""The native product beyond the op contract: every kind of term, segment and tile, any number of threads, bad input."""

import ctypes

import pytest
import torch

from fuselora.functional import quantize_4bit
from fuselora.kernels import native, nf4
from fuselora.kernels.native_gemm import Term, adapter_terms, gemm
from fuselora.testing import assert_kernel_close, poisoned_empty

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K, rank: one number; every last tile; few rows, 4-bit blocks across rows or not; an odd depth; several segments
# of the depth; more rows than rest between segments; a width of each number of vectors.
SHAPES = (
    *((1, 1, 1, 1), (7, 33, 65, 3), (3, 130, 64, 2), (8, 18, 96, 4), (47, 100, 200, 16), (33, 17, 1291, 5)),
    *((5, 64, 2700, 8), (1100, 70, 1400, 4), (25, 96, 128, 48)),
)
K = 2.5  # long reductions


def operands(m, n, k, rank, dtype):
    x, dy, s = (torch.randn(m, width).to(dtype) for width in (k, n, rank))
    w, bias = (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype)
    return x, dy, s, w, bias, torch.randn(rank, k), torch.randn(n, rank)


def mm(a, b):
    """A product as stock makes it: rounded to the dtype, as a sum of fp32 products where that is 16 bits wide."""
    return (a.float() @ b.float()).to(a.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_products_obey_the_numerics_rule(shape, dtype):
    m, n, k, rank = shape
    x, dy, s, w, bias, a, b = operands(*shape, dtype)
    split = dtype != torch.float32
    with poisoned_empty():
        y = gemm([Term(x, w), *adapter_terms(s, b, False, 2.0, split)], n, bias=bias)
        dx = gemm([Term(dy, w, True), *adapter_terms(s, a, True, 1.0, split)], k)
        db = gemm([Term(s.t().contiguous(), dy, True)], n, alpha=3.0, dtype=torch.float32, transposed=True)
        low = gemm(adapter_terms(x, a, False, 1.0, split), rank)
        ds = gemm(adapter_terms(dy, b, True, 2.0, split), rank)
    exact = [t.double() for t in (x, dy, s, w, bias, a, b)]
    ex, edy, es, ew, ebias, ea, eb = exact
    lowered = [t.to(dtype) for t in (2 * b, a)]
    stock_y = mm(x, w.t()) + mm(s, lowered[0].t()) + bias
    assert_kernel_close(y, ex @ ew.t() + es @ (2 * eb).t() + ebias, stock_y, name="y", k=K)
    assert_kernel_close(dx, edy @ ew + es @ ea, mm(dy, w) + mm(s, lowered[1]), name="dx", k=K)
    assert_kernel_close(db, 3 * (edy.t() @ es), 3 * (dy.float().t() @ s.float()), name="db", k=K)
    if split:  # as stock multiplies fp32 adapters
        assert_kernel_close(low, ex @ ea.t(), (x.float() @ a.t()).to(dtype), name="s", k=K)
        assert_kernel_close(ds, edy @ (2 * eb), (dy.float() @ (2 * b)).to(dtype), name="ds", k=K)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("rows", [300, 640, 1100, 1280, 2048, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_adapter_gradients_of_many_rows_obey_the_numerics_rule(rows, dtype, mean):
    """dA and dB, fp32 sums over the rows, next to stock's fp32 products of the widened operands. With a mean the sums
    grow with the rows, and so does the rounding of every addition."""
    x, _, s, *_ = operands(rows, 1, 512, 16, dtype)
    x, s = x + mean, s + mean / 4
    upright, truth, stock = s.t().contiguous(), s.double().t() @ x.double(), s.float().t() @ x.float()
    for transposed in (False, True):
        grad = gemm([Term(upright, x, True)], 512, dtype=torch.float32, transposed=transposed)
        assert_kernel_close(grad.t() if transposed else grad, truth, stock, name=f"transposed {transposed}", k=K)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_4bit_products_have_the_bits_of_the_dequantised_weight(shape, dtype, double):
    """The weights in the panels are those of the dequantised tensor, so from 9 rows on the product is the same; fewer
    rows add along the depth."""
    m, n, k, _ = shape
    x, dy, _, _, bias, _, _ = operands(*shape, dtype)
    q = quantize_4bit(torch.randn(n, k), "nf4" if double else "fp4", 64 if k > 100 else 32, double=double)
    w = nf4.dequantize_4bit(q, dtype)
    y = gemm([Term(x, None, quantized=q.operands())], n, bias=bias)
    dx = gemm([Term(dy, None, True, quantized=q.operands())], k)
    assert torch.equal(dx, gemm([Term(dy, w, True)], k))
    if m > 8:
        assert torch.equal(y, gemm([Term(x, w)], n, bias=bias))
    truth = x.double() @ w.double().t() + bias.double()
    assert_kernel_close(y, truth, mm(x, w.t()) + bias, name="y", k=K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_threads_do_not_change_bits(dtype):
    x, dy, s, w, bias, a, b = operands(1100, 70, 1400, 4, dtype)
    q = quantize_4bit(torch.randn(70, 1400))

    def run():
        terms = adapter_terms(s, b, False, 2.0, True)
        yield gemm([Term(x, w), *terms], 70, bias=bias)
        yield gemm([Term(dy, w, True)], 1400)
        yield gemm([Term(s.t().contiguous(), x, True)], 1400, dtype=torch.float32)
        yield gemm([Term(s.t().contiguous(), x, True)], 1400, dtype=torch.float32, transposed=True)
        yield gemm(adapter_terms(x, a, False, 1.0, True), 4)
        yield gemm([Term(x[:3], None, quantized=q.operands())], 70)

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(list(run()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_native_many_terms_and_none():
    """More terms than a segment holds, cut between them; terms without depth; no rows."""
    ones = torch.ones(1100, 3)
    terms = [Term(ones * i, torch.eye(3)) for i in range(20)]
    assert torch.equal(gemm(terms, 3), ones * sum(range(20)))
    nothing = [Term(torch.ones(2, 0), torch.ones(4, 0))]
    assert torch.equal(gemm(nothing, 4, bias=torch.arange(4.0)), torch.arange(4.0).expand(2, 4))
    assert torch.equal(gemm(nothing, 4), torch.zeros(2, 4))
    assert gemm([Term(torch.ones(0, 3), torch.ones(4, 3))], 4).shape == (0, 4)


def test_native_bad_arguments_raise_the_library_s_sentence():
    bad = ctypes.create_string_buffer(80)
    for arguments, sentence in (
        ((1, 2, 0, -1, 4, bad, 1, None, 1.0, 0, 1), "gemm: bad argument: m -1, n 4"),
        ((2, 2, 0, 4, 4, bad, 1, None, 1.0, 0, 1), "gemm: bad argument: m 4, n 4, 1 terms, dtypes 0 0, strides 2 2"),
        ((4, 1, 0, 4, 4, bad, 1, None, 1.0, 0, 1), "gemm: bad argument: term 0: k 0"),
        ((4, 1, 0, 4, 4, bad, 1, None, 1.0, 7, 1), "dtypes 7 0"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            native.call("fuselora_gemm", None, *arguments)
