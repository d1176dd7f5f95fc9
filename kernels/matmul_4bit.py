"""Products with a 4-bit weight W [N, K]: a linear layer whose weight is frozen, and its input gradient.

    forward          Y  = X W^T + bias     X [M, K] -> [M, N]
    transpose=True   dX = dY W             dY [M, N] -> [M, K]

W is the weight of nf4.py rounded to X's dtype. For many rows it is dequantised, 2 bytes per weight written and read
again, and multiplied by a library GEMM; for few rows kernels/gpu/nf4_matmul.py dequantises inside the product, and for
up to 8, forward, csrc/cuda/nf4_matmul.cuh. The CPU's product decodes the weight panel by panel, for any number of rows
(csrc/cpu/gemm.cpp).

Bytes of a fused product: 0.5 NK + scales, X and Y once, and fp32 partial sums, written and read, where the reduced
dimension is split over programs (kernels/gpu/nf4_plan.py). Saved for backward: the 4-bit weight itself, nothing new.
Numerics: fp32 accumulation over weights rounded to X's dtype, one rounding. csrc/cuda/nf4_matmul.cuh takes weights that
are nearer to the 4-bit ones: codes of 11 bits times fp32 scales.
Source: Dettmers et al. 2023, "QLoRA", eq. 5 and 6, without the low-rank part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, native, nf4_cuda
from .first_order import first_order
from .gpu import choices, nf4_plan
from .gpu.launch import capability, lazy, refusal
from .native_gemm import Term, gemm, has_amx, rows_of
from .nf4 import QUANT, Quantized4bit, _reference, check_quantized, random_weight, stored_bytes
from .registry import Cost, Sample, define, function, implement, ops


@torch.no_grad()
def _reference_matmul(
    x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None,
    offset: Tensor | None, blocksize: int, blocksize2: int, rows: int, cols: int, bias: Tensor | None, transpose: bool,
) -> Tensor:  # fmt: skip
    w = ops.dequantize_4bit(data, absmax, code, absmax2, code2, offset, blocksize, blocksize2, rows, cols, x.dtype)
    if transpose:
        assert bias is None
        return x @ w
    return x @ w.t() if bias is None else torch.addmm(bias, x, w.t())


def _fake(
    x, data, absmax, code, absmax2, code2, offset, blocksize, blocksize2, rows, cols, bias, transpose
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], cols if transpose else rows)


def exact_weight(device: torch.device, shape: tuple[int, int], blocksize: int, double: bool) -> Quantized4bit:
    """A weight that every dtype holds exactly, so that fp64 shows the errors of the product alone: codes are eighths,
    scales powers of two."""
    q = random_weight(torch.float32, device, shape, "nf4", blocksize, double)
    code = torch.arange(-8, 8, device=device) / 8.0
    if not double:
        return q._replace(code=code, absmax=2.0 ** torch.randint(-3, 1, q.absmax.shape, device=device))
    code2 = 2.0 ** (torch.arange(256, device=device) % 2 - 1)
    absmax2, offset = torch.full_like(q.absmax2, 0.5), torch.tensor(0.25, device=device)
    return q._replace(code=code, code2=code2, absmax2=absmax2, offset=offset)


# (M, N, K), blocksize, double: one row; several rows; a block across all rows; an odd number of 64 columns; no rows.
SAMPLES = (
    ((1, 24, 64), 64, True),
    ((5, 40, 128), 32, False),
    ((3, 16, 64), 4096, False),
    ((2, 72, 192), 64, True),
    ((0, 16, 64), 64, False),
)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for (m, n, k), blocksize, double in SAMPLES:
        q = exact_weight(device, (n, k), blocksize, double)
        for transpose in (False, True):
            x = torch.randn(m, n if transpose else k, dtype=dtype, device=device)
            bias = None if transpose or double else torch.randn(n, dtype=dtype, device=device)
            yield Sample(f"{m}x{n}x{k}-{blocksize}-{double:d}-{transpose:d}", (x, *q.operands(), bias, transpose))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, m, n, k in (
        ("llama3-8b-gate", 1, 14336, 4096),
        ("llama3-8b-down", 16, 4096, 14336),
        ("llama3-8b-q", 64, 4096, 4096),
        ("qwen3-0.6b-k", 33, 1024, 1024),
    ):
        q = random_weight(dtype, device, (n, k), "nf4", 64, True)
        for transpose in (False, True):
            x = torch.randn(m, n if transpose else k, dtype=dtype, device=device)
            yield Sample(f"{name}-{m}-{'dx' if transpose else 'y'}", (x, *q.operands(), None, transpose))


def _cost(
    x, data, absmax, code, absmax2, code2, offset, blocksize, blocksize2, rows, cols, bias, transpose
) -> Cost:  # fmt: skip
    m, width = x.shape[0], cols if transpose else rows
    extra = 0 if bias is None else bias.numel()
    plan = nf4_plan.plan(x, rows, cols, transpose)
    moved = stored_bytes(data, absmax, absmax2) + (x.numel() + m * width + extra) * x.element_size()
    return Cost(moved + 2 * plan.partial_bytes(m, width), 2 * m * rows * cols)


MATMUL_4BIT = define(
    f"matmul_4bit(Tensor x, {QUANT}, Tensor? bias, bool transpose) -> Tensor",
    reference=_reference_matmul,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    workloads=_workloads,
    long_reduction=True,
)


def _triton_supports(
    x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None,
    offset: Tensor | None, blocksize: int, blocksize2: int, rows: int, cols: int, bias: Tensor | None, transpose: bool,
) -> str | None:  # fmt: skip
    if reason := refusal(x, code, bias, dot=True):
        return reason
    if cols % 64:
        return "K is not a multiple of 64"
    if choices.choose("matmul_4bit", capability(x.device), x.dtype, x.shape[0], rows, cols) is None:
        return "M above the fused threshold: dequantise + library GEMM"
    return None


def native_refusal(rows: int, *tensors: Tensor) -> str | None:
    """Why the native CPU products of these operands, all of one dtype, with 4-bit weights can't run, or don't pay."""
    if len({t.dtype for t in tensors}) > 1:
        return "inputs have different dtypes"
    if reason := native.unsupported(*tensors):
        return reason
    if tensors[0].dtype == torch.bfloat16 and has_amx() and rows > AMX_ROWS.get(native.isa(), VECTOR_ROWS):
        return "many rows: dequantise once, and multiply by oneDNN, which has AMX"
    return None


# Rows up to which bf16 products decode 4-bit weights where oneDNN has AMX: predictions, measured on no such processor.
# Dequantising first moves 6.5 to 10 bytes per weight, 0.8 ns at 11 GB/s, and oneDNN then takes 0.9 ns for 1024 rows
# (85 % of 512 multiply-adds per cycle at 2.6 GHz). In our tiles 1024 rows take 1.0 ns (75 %) and 0.1 ns of decoding:
# less up to 3072 rows. vdpbf16ps multiplies at a sixteenth of the rate, so 64 rows take as long as the bytes.
AMX_ROWS = {"amx": 3072}
VECTOR_ROWS = 64


def _cpu(x: Tensor, *operands) -> Tensor:
    *weight, bias, transpose = operands
    width = weight[-1] if transpose else weight[-2]
    term = Term(rows_of(x), None, transpose, quantized=tuple(weight))
    return gemm([term], width, bias=None if bias is None else rows_of(bias))


def _cpu_supports(x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, *rest) -> str | None:
    bias = rest[-2]
    if code.dtype != torch.float32:
        return f"the code is {code.dtype}"
    return native_refusal(x.shape[0], x) if bias is None else native_refusal(x.shape[0], x, bias)


implement(MATMUL_4BIT, "cpu", _cpu, _cpu_supports)
implement(MATMUL_4BIT, "cuda", nf4_cuda.matmul_4bit, nf4_cuda.matmul_refusal)
implement(MATMUL_4BIT, "triton", lazy("nf4_matmul", "matmul_4bit"), _triton_supports)


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, *operands):
        ctx.save_for_backward(*operands[:6])
        ctx.sizes = operands[6:]
        return ops.matmul_4bit(x, *operands, bias, False)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = ops.matmul_4bit(dy, *ctx.saved_tensors, *ctx.sizes, None, True)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0)
        return dx, dbias, *[None] * 10


def linear_4bit(x: Tensor, q: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with a frozen 4-bit weight.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; W is rounded to its dtype.
        q: the weight [N, K].
        bias: [N], of x's dtype.

    Returns:
        [..., N] of x's dtype, differentiable in x and bias. Saves nothing but the 4-bit weight.

    Raises:
        ValueError: parts that do not fit each other.
    """
    checks.check_float("linear_4bit", "x", x)
    check_quantized("linear_4bit", q)
    checks.check_dim("linear_4bit", "x", x, -1, q.shape[1])
    if bias is not None:
        checks.check_ndim("linear_4bit", "bias", bias, 1)
        checks.check_dim("linear_4bit", "bias", bias, 0, q.shape[0])
        checks.check_choice("linear_4bit", "bias.dtype", bias.dtype, (x.dtype,))
    checks.check_same_device("linear_4bit", x=x, q=q.data, bias=bias)
    rows = x.reshape(x.shape[:-1].numel(), q.shape[1])
    return _Linear4bit.apply(rows, bias, *q.operands()).view(*x.shape[:-1], q.shape[0])


def eager_linear_4bit(x: Tensor, q: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """Stock PyTorch's linear on the dequantised weight."""
    return torch.nn.functional.linear(x, _reference(*q.operands(), x.dtype), bias)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for (m, n, k), blocksize, double in SAMPLES:
        q = exact_weight(device, (n, k), blocksize, double)
        x = torch.randn(m, k, dtype=dtype, device=device).requires_grad_()
        bias = None if double else torch.randn(n, dtype=dtype, device=device).requires_grad_()
        yield Sample(f"{m}x{n}x{k}-{blocksize}-{double:d}", (x, q, bias))
    x = torch.randn(2, 3, 64, dtype=dtype, device=device).requires_grad_()
    yield Sample("3-d", (x, exact_weight(device, (16, 64), 64, True)))


function(linear_4bit, eager=eager_linear_4bit, samples=_function_samples, long_reduction=True)
