"""RMSNorm, optionally fused with the residual add in front of it.

    h = x + residual                      (only in ``add_rms_norm``)
    rstd = 1 / sqrt(mean_j(h_j^2) + eps)
    y = rounding(h * rstd, weight)

    mode "llama":  y = w * round(h * rstd)        rounded to the input dtype before the product, as transformers does
    mode "gemma":  y = round(h * rstd * (1 + w))
    mode "none":   y = round(h * rstd * w)        one rounding at the end (torch.nn.RMSNorm, OLMo 2); w may be None

    g_j = dy_j * (w_j or 1 + w_j),  xhat = h * rstd
    dh = rstd * (g - xhat * mean_j(g_j * xhat_j)) + dh_residual
    dw_j = sum_rows(dy_j * xhat_j)                skipped when the weight is frozen

Shapes: x, residual, y, h [..., H]; weight [H]; rstd [...] in fp32 (fp64 for fp64 inputs).
Saved for backward: h (x itself without residual) and rstd; xhat is recomputed.
Bytes, n elements of b bytes: forward 2nb (4nb with residual), backward 3nb (4nb with the residual gradient); a trained
weight adds a GPU's partial sums, 8 bytes per column and multiprocessor.
Numerics: fp32 inside; y has dtype promote(x, w) in mode "llama", else that of x. Deterministic: no atomics.
Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, native
from .first_order import first_order
from .gpu.launch import lazy, refusal, sm_count
from .gpu.norm_plan import partial_bytes
from .registry import Cost, Sample, define, function, implement, ops
from .saving import remember_norm

MODES = ("llama", "gemma", "none")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(weight: Tensor | None, mode: str, acc: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    return weight.to(acc) + 1 if mode == "gemma" else weight.to(acc)


def out_dtype(x: Tensor, weight: Tensor | None, mode: str) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if weight is not None and mode == "llama" else x.dtype


def _reference(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str):
    h = x if residual is None else x + residual
    acc = accumulator(x.dtype)
    hf = h.to(acc)
    rstd = torch.rsqrt(hf.square().mean(-1) + eps)
    xhat = hf * rstd.unsqueeze(-1)
    if mode == "llama":
        y = xhat.to(x.dtype)
        y = y if weight is None else weight * y
    else:
        scale = _scale(weight, mode, acc)
        y = (xhat if scale is None else xhat * scale).to(x.dtype)
    return y, (torch.empty(0, dtype=x.dtype, device=x.device) if residual is None else h), rstd


def _reference_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool
):
    acc = accumulator(h.dtype)
    xhat = h.to(acc) * rstd.unsqueeze(-1)
    dyf = dy.to(acc)
    scale = _scale(weight, mode, acc)
    g = dyf if scale is None else dyf * scale
    dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    if dh is not None:
        dx += dh
    if not need_dw or weight is None:
        return dx.to(h.dtype), torch.empty(0, dtype=h.dtype, device=h.device)
    if mode == "llama":
        xhat = xhat.to(h.dtype).to(acc)
    dw = (dyf * xhat).reshape(-1, h.shape[-1]).sum(0)
    return dx.to(h.dtype), dw.to(weight.dtype)


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str):
    y = torch.empty(x.shape, dtype=out_dtype(x, weight, mode), device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, h, x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype))


def _fake_bwd(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool):
    dw = h.new_empty(0) if not need_dw or weight is None else torch.empty_like(weight)
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), dw


SHAPES = ((1, 8), (3, 24), (2, 5, 96), (7, 257), (0, 16))  # one row; odd rows; 3-D; ragged vector tail; empty batch


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        x, w = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape[-1], dtype=dtype, device=device)
        for mode in MODES:
            yield Sample(f"{shape}-{mode}", (x, None, w, 1e-6, mode))
        yield Sample(f"{shape}-residual", (x, torch.randn_like(x), w, 1e-6, "llama"))
        yield Sample(f"{shape}-no-weight", (x, None, None, 1e-6, "none"))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _op_samples(dtype, device):
        x, residual, w, eps, mode = sample.args
        h = x if residual is None else x + residual
        rstd = _reference(x, residual, w, eps, mode)[2]
        dh = None if residual is None else torch.randn_like(h)
        for need_dw in (False, True):
            yield Sample(f"{sample.name}-dw{need_dw:d}", (torch.randn_like(x), dh, h, w, rstd, mode, need_dw))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    yield Sample("llama-3-8b-add", (tensor(4096, 4096), tensor(4096, 4096), tensor(4096), 1e-5, "llama"))
    yield Sample("qwen3-0.6b", (tensor(4096, 1024), None, tensor(1024), 1e-6, "llama"))
    yield Sample("qwen3-0.6b-q-norm", (tensor(1, 4096, 16, 128), None, tensor(128), 1e-6, "llama"))
    yield Sample("gemma-3-1b", (tensor(4095, 1152), None, tensor(1152), 1e-6, "gemma"))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        x, residual, w, _, mode = sample.args
        rstd = torch.rand(x.shape[:-1], dtype=accumulator(dtype), device=device)
        for need_dw in (False, True):
            dy, dh = torch.randn_like(x), None if residual is None else torch.randn_like(x)
            yield Sample(f"{sample.name}-dw{need_dw:d}", (dy, dh, x, w, rstd, mode, need_dw))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _cost(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str) -> Cost:
    n, rows = x.numel(), x.numel() // max(1, x.shape[-1])
    written = n * out_dtype(x, weight, mode).itemsize + rows * accumulator(x.dtype).itemsize
    return Cost(_bytes(x, residual, residual, weight) + written, 5 * n)


def _cost_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool
) -> Cost:
    moved = _bytes(dy, dh, h, h, weight, rstd)
    if need_dw and weight is not None:
        moved += _bytes(weight) + partial_bytes(rstd.numel(), h.shape[-1], sm_count(h.device))
    return Cost(moved, 9 * dy.numel())


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, str mode) -> (Tensor y, Tensor h, Tensor rstd)",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    cost=_cost,
    workloads=_workloads,
)
RMS_NORM_BWD = define(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, str mode, bool need_dw)"
    " -> (Tensor dx, Tensor dw)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
    long_reduction=True,
    workloads=_bwd_workloads,
)


def _cpu(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str):
    x, cols = x.contiguous(), x.shape[-1]
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    y = torch.empty(x.shape, dtype=out_dtype(x, weight, mode))
    h = x.new_empty(0 if residual is None else x.shape)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    native.call(
        "fuselora_rms_norm",
        *map(native.pointer, (y, h, rstd, x, residual, weight)),
        *(x.numel() // cols, cols),
        *(native.DTYPE[x.dtype], native.DTYPE[x.dtype if weight is None else weight.dtype]),
        *(eps, native.NORM_MODE[mode], torch.get_num_threads()),
    )
    return y, h, rstd


def _cpu_supports(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str) -> str | None:
    return "the last dimension is empty" if x.shape[-1] == 0 else native.unsupported(x, weight)


def _cpu_bwd(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool):
    dy, h, rstd, cols = dy.contiguous(), h.contiguous(), rstd.contiguous(), h.shape[-1]
    dh = None if dh is None else dh.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = torch.empty(h.shape, dtype=h.dtype)
    dw = h.new_empty(0) if not need_dw or weight is None else torch.empty_like(weight)
    native.call(
        "fuselora_rms_norm_bwd",
        native.pointer(dx),
        native.pointer(dw) if dw.numel() else None,
        *map(native.pointer, (dy, dh, h, weight, rstd)),
        *(h.numel() // cols, cols),
        *(native.DTYPE[t.dtype] for t in (dy, h, h if weight is None else weight)),
        *(native.NORM_MODE[mode], torch.get_num_threads()),
    )
    return dx, dw


def _cpu_bwd_supports(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool
) -> str | None:
    if h.shape[-1] == 0:
        return "the last dimension is empty"
    if dy.dtype not in (h.dtype, torch.float32) or (dh is not None and dh.dtype != h.dtype):
        return f"gradients have dtypes {dy.dtype} and {None if dh is None else dh.dtype} with {h.dtype} activations"
    return native.unsupported(h, weight)


def _triton_supports(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str) -> str | None:
    if x.shape[-1] == 0:
        return "the last dimension is empty"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype} beside {x.dtype}"
    return refusal(x, residual, weight)


def _triton_bwd_supports(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool
) -> str | None:
    return "the last dimension is empty" if h.shape[-1] == 0 else refusal(dy, dh, h, weight, rstd)


implement(RMS_NORM, "cpu", _cpu, _cpu_supports)
implement(RMS_NORM_BWD, "cpu", _cpu_bwd, _cpu_bwd_supports)
implement(RMS_NORM, "triton", lazy("norm", "rms_norm"), _triton_supports)
implement(RMS_NORM_BWD, "triton", lazy("norm_bwd", "rms_norm_bwd"), _triton_bwd_supports)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, mode):
        y, _, rstd = ops.rms_norm(x, None, weight, eps, mode)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mode = mode
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = ops.rms_norm_bwd(dy, None, x, weight, rstd, ctx.mode, need_dw)
        return dx, dw if need_dw else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, mode):
        y, h, rstd = ops.rms_norm(x, residual, weight, eps, mode)
        ctx.save_for_backward(h, weight, rstd)
        ctx.mode = mode
        return y, h

    @staticmethod
    @first_order
    def backward(ctx, dy, dh):
        h, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[2]
        dx, dw = ops.rms_norm_bwd(dy, dh, h, weight, rstd, ctx.mode, need_dw)
        return dx, dx, dw if need_dw else None, None, None


def _check(op: str, x: Tensor, weight: Tensor | None, mode: str) -> None:
    checks.check_rows(op, "x", x)
    checks.check_choice(op, "mode", mode, MODES)
    checks.check_same_device(op, x=x, weight=weight)
    if weight is not None:
        checks.check_float(op, "weight", weight)
        checks.check_ndim(op, "weight", weight, 1)
        checks.check_dim(op, "weight", weight, 0, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, mode: str = "llama") -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., H], fp32, bf16, fp16 or fp64, any strides.
        weight: [H] or None; a frozen weight costs nothing in backward.
        eps: added to the mean square.
        mode: "llama", "gemma" or "none"; see the module docstring for the rounding of each.

    Returns:
        [..., H], contiguous; dtype promote(x, weight) in mode "llama", else x's.

    Raises:
        ValueError: wrong dtype, device, shape or mode.
    """
    _check("rms_norm", x, weight, mode)
    return remember_norm(_RMSNorm.apply(x, weight, eps, mode), x, weight, eps, mode)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, mode: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual) in one pass; backward adds both gradients in one pass.

    Args and errors as ``rms_norm``; ``residual`` has x's shape and dtype.
    """
    _check("add_rms_norm", x, weight, mode)
    checks.check_same_device("add_rms_norm", x=x, residual=residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        got = f"{tuple(residual.shape)} {residual.dtype}"
        raise checks.fail("add_rms_norm", "residual", f"{tuple(x.shape)} {x.dtype}", got, "match x")
    y, h = _AddRMSNorm.apply(x, residual, weight, eps, mode)
    return remember_norm(y, h, weight, eps, mode), h


def eager_rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, mode: str = "llama") -> Tensor:
    """Stock PyTorch, as the transformers modules compute it."""
    return _reference(x, None, weight, eps, mode)[0]


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps=1e-6, mode="llama"):
    return _reference(x, residual, weight, eps, mode)[:2]


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        for mode in MODES:
            for trained in (False, True):
                w = torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=trained)
                yield Sample(f"{shape}-{mode}-trained{trained:d}", (x, w, 1e-6, mode))
    wide = torch.randn(4, 6, 40, dtype=dtype, device=device)
    weight = torch.randn(40, dtype=dtype, device=device)
    yield Sample("non-contiguous", (wide.transpose(0, 1).requires_grad_(), weight))
    yield Sample("row-strided", (torch.randn(5, 80, dtype=dtype, device=device)[:, :40].requires_grad_(), weight))
    yield Sample("zero-stride", (torch.randn(1, 40, dtype=dtype, device=device).expand(6, 40).requires_grad_(), weight))


def _add_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _function_samples(dtype, device):
        x, *rest = sample.args
        yield Sample(sample.name, (x, torch.randn(x.shape, dtype=dtype, device=device, requires_grad=True), *rest))


function(rms_norm, eager=eager_rms_norm, samples=_function_samples, long_reduction=True)
function(add_rms_norm, eager=eager_add_rms_norm, samples=_add_samples, long_reduction=True)
