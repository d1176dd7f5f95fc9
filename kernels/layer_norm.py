"""LayerNorm over the last dimension.

    mean = mean_j(x_j),  rstd = 1 / sqrt(mean_j((x_j - mean)^2) + eps)
    xhat = (x - mean) * rstd
    y = xhat * w + b                                        w = 1, b = 0 when absent

    g = dy * w
    dx = rstd * (g - mean_j(g_j) - xhat * mean_j(g_j * xhat_j))
    dw_j = sum_rows(dy_j * xhat_j),  db_j = sum_rows(dy_j)  each skipped when frozen

Shapes: x, y [..., H]; weight, bias [H] or None; mean, rstd [...] in fp32 (fp64 for fp64 inputs).
Saved for backward: x, mean and rstd; xhat is recomputed. (torch on CPU keeps mean and rstd in bf16 for bf16 inputs.)
Bytes, n elements of b bytes: forward 2nb, backward 3nb; trained weight and bias each add a GPU's partial sums, 8 bytes
per column and multiprocessor.
Numerics: fp32 inside, y in x's dtype, rounded once; the weight may have another dtype than x. Deterministic.
Source: Ba, Kiros and Hinton 2016, "Layer Normalization", eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, native
from .first_order import first_order
from .gpu.launch import lazy, refusal, sm_count
from .gpu.norm_plan import partial_bytes
from .registry import Cost, Sample, define, function, implement, ops
from .rms_norm import accumulator


def _operands(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """x and weight as torch's kernel wants them for fp32 statistics: an fp32 weight beside x. On CPU x may stay in
    its own dtype, other devices want one dtype for both."""
    acc = accumulator(x.dtype)
    scale = torch.ones(x.shape[-1], dtype=acc, device=x.device) if weight is None else weight.to(acc)
    return (x if x.device.type == "cpu" else x.to(acc)), scale


@torch.no_grad()
def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    operand, scale = _operands(x, weight)
    shift = None if bias is None else bias.to(scale.dtype)
    y, mean, rstd = torch.native_layer_norm(operand, x.shape[-1:], scale, shift, eps)
    return y.to(x.dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@torch.no_grad()
def _reference_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
):
    operand, scale = _operands(x, weight)
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy.to(operand.dtype), operand, x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), scale,
        torch.zeros_like(scale) if need_db else None, [True, need_dw, need_db],
    )  # fmt: skip
    empty = torch.empty(0, dtype=rstd.dtype, device=x.device)
    return dx.to(x.dtype), dw if need_dw else empty, db if need_db else empty.clone()


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    acc = accumulator(x.dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=acc, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


def _fake_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool):
    dw, db = (rstd.new_empty(x.shape[-1] if needed else 0) for needed in (need_dw, need_db))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dw, db


SHAPES = ((1, 8), (3, 24), (2, 5, 96), (7, 257), (0, 16))  # one row; odd rows; 3-D; ragged vector tail; empty batch


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype, device=device)
        w, b = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
        yield Sample(f"{shape}", (x, w, b, 1e-5))
        yield Sample(f"{shape}-no-bias", (x, w, None, 1e-5))
        yield Sample(f"{shape}-plain", (x, None, None, 1e-5))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _op_samples(dtype, device):
        x, w, b, eps = sample.args
        _, mean, rstd = _reference(x, w, b, eps)
        for need_dw, need_db in ((False, False), (True, False), (True, True)):
            name = f"{sample.name}-dw{need_dw:d}-db{need_db:d}"
            yield Sample(name, (torch.randn_like(x), x, w, mean, rstd, need_dw, need_db))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, rows, cols in (("falcon-7b", 4096, 4544), ("gpt2", 4096, 768), ("siglip-so400m", 4095, 1152)):
        x, w, b = (torch.randn(shape, dtype=dtype, device=device) for shape in ((rows, cols), (cols,), (cols,)))
        yield Sample(name, (x, w, b, 1e-5))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        x, w, *_ = sample.args
        mean, rstd = (torch.rand(x.shape[0], dtype=accumulator(dtype), device=device) for _ in range(2))
        for trained in (False, True):
            name = f"{sample.name}-{'trained' if trained else 'frozen'}"
            yield Sample(name, (torch.randn_like(x), x, w, mean, rstd, trained, trained))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Cost:
    rows = x.numel() // max(1, x.shape[-1])
    return Cost(_bytes(x, x, weight, bias) + 2 * rows * accumulator(x.dtype).itemsize, 8 * x.numel())


def _cost_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> Cost:
    sums = partial_bytes(rstd.numel(), x.shape[-1], sm_count(x.device)) + x.shape[-1] * rstd.element_size()
    return Cost(_bytes(dy, x, x, weight, mean, rstd) + (need_dw + need_db) * sums, 14 * dy.numel())


LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    cost=_cost,
    workloads=_workloads,
)
LAYER_NORM_BWD = define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dw, bool need_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
    long_reduction=True,
    workloads=_bwd_workloads,
)


def _code(vector: Tensor | None) -> int:
    """An absent vector's dtype is never read."""
    return native.DTYPE[torch.float32 if vector is None else vector.dtype]


def _cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    x, cols = x.contiguous(), x.shape[-1]
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    y = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    native.call(
        "fuselora_layer_norm",
        *map(native.pointer, (y, mean, rstd, x, weight, bias)),
        *(x.numel() // cols, cols),
        *(native.DTYPE[x.dtype], _code(weight), _code(bias)),
        *(eps, torch.get_num_threads()),
    )
    return y, mean, rstd


def _cpu_supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return "the last dimension is empty" if x.shape[-1] == 0 else native.unsupported(x, weight, bias)


def _cpu_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool):
    dy, x, mean, rstd, cols = dy.contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous(), x.shape[-1]
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype)
    dw, db = (torch.empty(cols if needed else 0, dtype=torch.float32) for needed in (need_dw, need_db))
    native.call(
        "fuselora_layer_norm_bwd",
        native.pointer(dx),
        *(native.pointer(sums) if needed else None for sums, needed in ((dw, need_dw), (db, need_db))),
        *map(native.pointer, (dy, x, weight, mean, rstd)),
        *(x.numel() // cols, cols),
        *(native.DTYPE[x.dtype], _code(weight), torch.get_num_threads()),
    )
    return dx, dw, db


def _cpu_bwd_supports(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> str | None:
    if x.shape[-1] == 0:
        return "the last dimension is empty"
    if dy.dtype != x.dtype:
        return f"the gradient is {dy.dtype} beside {x.dtype} activations"
    return native.unsupported(x, weight)


def _triton_supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return "the last dimension is empty" if x.shape[-1] == 0 else refusal(x, weight, bias)


def _triton_bwd_supports(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> str | None:
    return "the last dimension is empty" if x.shape[-1] == 0 else refusal(dy, x, weight, mean, rstd)


implement(LAYER_NORM, "cpu", _cpu, _cpu_supports)
implement(LAYER_NORM_BWD, "cpu", _cpu_bwd, _cpu_bwd_supports)
implement(LAYER_NORM, "triton", lazy("norm", "layer_norm"), _triton_supports)
implement(LAYER_NORM_BWD, "triton", lazy("norm_bwd", "layer_norm_bwd"), _triton_bwd_supports)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = ops.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        need_dw, need_db = ctx.needs_input_grad[1:3]
        dx, dw, db = ops.layer_norm_bwd(dy, x, weight, mean, rstd, need_dw, need_db)
        return dx, dw.to(weight.dtype) if need_dw else None, db.to(ctx.bias_dtype) if need_db else None, None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., H], fp32, bf16, fp16 or fp64, any strides.
        weight, bias: [H] or None; a frozen one costs nothing in backward.
        eps: added to the variance.

    Returns:
        [..., H], contiguous, in x's dtype.

    Raises:
        ValueError: wrong dtype, device or shape.
    """
    checks.check_rows("layer_norm", "x", x)
    checks.check_same_device("layer_norm", x=x, weight=weight, bias=bias)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            checks.check_float("layer_norm", name, vector)
            checks.check_ndim("layer_norm", name, vector, 1)
            checks.check_dim("layer_norm", name, vector, 0, x.shape[-1])
    return _LayerNorm.apply(x, weight, bias, eps)


def eager_layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Stock PyTorch."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def vector(size: int, trained: bool) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, requires_grad=trained)

    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        yield Sample(f"{shape}-plain", (x,))
        yield Sample(f"{shape}-frozen", (x, vector(shape[-1], False), vector(shape[-1], False)))
        yield Sample(f"{shape}-no-bias", (x, vector(shape[-1], True), None, 1e-6))
        yield Sample(f"{shape}-trained", (x, vector(shape[-1], True), vector(shape[-1], True)))
    weight, bias = vector(40, True), vector(40, True)
    wide = torch.randn(4, 6, 40, dtype=dtype, device=device)
    yield Sample("bias-only-trained", (torch.randn_like(wide).requires_grad_(), vector(40, False), bias))
    yield Sample("non-contiguous", (wide.transpose(0, 1).requires_grad_(), weight, bias))
    yield Sample("row-strided", (torch.randn(5, 80, dtype=dtype, device=device)[:, :40].requires_grad_(), weight, bias))
    yield Sample("zero-stride", (torch.randn(1, 40, dtype=dtype, device=device).expand(6, 40).requires_grad_(), weight))


function(layer_norm, eager=eager_layer_norm, samples=_function_samples, long_reduction=True)
