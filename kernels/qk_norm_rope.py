"""RMSNorm of every head of q and k, and their rotation, in one pass (Qwen3, Gemma 3).

    rstd = 1 / sqrt(mean_j(x_j^2) + eps)          over the D channels of a head
    n = rounding(x * rstd, w)                     w [D]: one weight for all heads of q, one for all of k
    y = RoPE(n, cos, sin)                         see rope.py

    mode "llama":  n = w * round(x * rstd)        Qwen3; rounded to x's dtype before the product, as transformers does
    mode "gemma":  n = round(x * rstd * (1 + w))  Gemma 3
    mode "none":   n = round(x * rstd * w)

Backward, with dn the adjoint rotation of dy, g_j = dn_j * (w_j or 1 + w_j), xhat = x * rstd:

    dx = rstd * (g - xhat * mean_j(g_j * xhat_j))
    dw_j = sum over tokens and heads of dn_j * xhat_j          (round(xhat_j) in mode "llama"); skipped when frozen

Shapes: q [B, S, Hq, D], k [B, S, Hk, D], any strides; cos, sin [B or 1, S, R], R even, R <= D; outputs contiguous;
rstd [B, S, H] in fp32 (fp64 for fp64 inputs).
Saved for backward: q, k (the outputs of their projections), rstd of every head, and cos and sin, which every layer of a
model shares; they get no gradient.
Bytes, n elements of b bytes: 2nb forward, 3nb backward, where norm, norm and rotation in turn move 4nb and 5nb; and the
tables, 4 bytes per head, and for a trained weight 8 bytes per channel of each of the programs' partial sums.
Numerics: fp32 inside; n is rounded as the norm alone rounds it, y once more; dn is not rounded. y has dtype
promote(x, w) in mode "llama", else that of x. On CPU the native norm and rotation run in turn. Deterministic.
Source: Zhang and Sennrich 2019, eq. 4; Su et al. 2021, eq. 34; norms of heads: Dehghani et al. 2023, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks, native
from .first_order import first_order
from .gpu.launch import lazy
from .registry import Cost, Sample, define, function, implement, ops
from .rms_norm import MODES, RMS_NORM, RMS_NORM_BWD, accumulator, eager_rms_norm, out_dtype
from .rope import (
    GRID,
    ROPE,
    check_heads,
    eager_rope,
    head_tiles,
    heads_first,
    heads_refusal,
    model_heads,
    table_bytes,
    tables,
)


def _in_turn(
    norm: Callable[..., Any], rotate: Callable[..., Any], q, k, q_weight, k_weight, cos, sin, eps, mode, pairs
):
    """Norm of q, norm of k, rotation of both, with these functions."""
    (q, _, q_rstd), (k, _, k_rstd) = norm(q, None, q_weight, eps, mode), norm(k, None, k_weight, eps, mode)
    return *rotate(q, k, cos, sin, pairs, False), q_rstd, k_rstd


def _reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    mode: str,
    interleaved: bool,
):
    return _in_turn(RMS_NORM.reference, ROPE.reference, q, k, q_weight, k_weight, cos, sin, eps, mode, interleaved)


def _reference_bwd(
    dy_q: Tensor,
    dy_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    mode: str,
    interleaved: bool,
    need_dw: bool,
):
    acc = accumulator(q.dtype)
    dn_q, dn_k = ROPE.reference(dy_q.to(acc), dy_k.to(acc), cos, sin, interleaved, True)
    dq, dw_q = RMS_NORM_BWD.reference(dn_q, None, q, q_weight, q_rstd, mode, need_dw)
    dk, dw_k = RMS_NORM_BWD.reference(dn_k, None, k, k_weight, k_rstd, mode, need_dw)
    return dq, dk, dw_q, dw_k


def _fake(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos, sin, eps: float, mode: str, interleaved: bool):
    heads = ((q, q_weight), (k, k_weight))
    rotated = (torch.empty(x.shape, dtype=out_dtype(x, w, mode), device=x.device) for x, w in heads)
    return *rotated, *(x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype)) for x, _ in heads)


def _fake_bwd(
    dy_q, dy_k, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_rstd, k_rstd, cos, sin, mode, pairs, need_dw
):
    gradients = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    return *gradients, *(torch.empty_like(w) if need_dw else q.new_empty(0) for w in (q_weight, k_weight))


def _heads(dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[tuple[str, tuple[Any, ...], str, bool]]:
    """(name, tensors, mode, interleaved) of the edge grid, ``rounds`` times with modes and layouts in turn."""
    for turn in range(rounds):
        for i, (batch, length, heads_q, heads_k, width, rotary) in enumerate(GRID):
            q, k = (torch.randn(batch, length, h, width, dtype=dtype, device=device) for h in (heads_q, heads_k))
            weights = (torch.randn(width, dtype=dtype, device=device) for _ in range(2))
            mode, interleaved = MODES[(i + turn) % 3], (i + turn) % 2 == 1
            cos, sin = tables(1, length, rotary, interleaved, dtype, device)
            name = f"{tuple(q.shape)}-{rotary}-{mode}-interleaved{interleaved:d}"
            yield name, (q, k, *weights, cos, sin), mode, interleaved


def _op_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, tensors, mode, interleaved in _heads(dtype, device, 1):
        yield Sample(name, (*tensors, 1e-6, mode, interleaved))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for i, sample in enumerate(_op_samples(dtype, device)):
        q, k, q_weight, k_weight, cos, sin, eps, mode, interleaved = sample.args
        y_q, y_k, q_rstd, k_rstd = _reference(*sample.args)
        dy = torch.randn_like(y_q), torch.randn_like(y_k)
        saved = q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin
        yield Sample(f"{sample.name}-dw{i > 1:d}", (*dy, *saved, mode, interleaved, i > 1))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for name, q, k, cos, sin, interleaved in model_heads(dtype, device):
        if cos.shape[-1] < q.shape[-1]:
            continue  # no model normalises heads that it rotates in part
        weights = (torch.randn(q.shape[-1], dtype=dtype, device=device) for _ in range(2))
        mode = "gemma" if q.shape[-1] == 256 else "llama"
        yield Sample(name, (q, k, *weights, cos, sin, 1e-6, mode, interleaved))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _workloads(dtype, device):
        q, k, q_weight, k_weight, cos, sin, _, mode, interleaved = sample.args
        dy = heads_first(q), heads_first(k)
        rstd = (torch.randn(x.shape[:-1], device=device) for x in (q, k))
        args = (*dy, q, k, q_weight, k_weight, *rstd, cos, sin, mode, interleaved)
        for need_dw in (False, True):
            yield Sample(f"{sample.name}-dw{need_dw:d}", (*args, need_dw))


def _per_head(q: Tensor, k: Tensor) -> int:
    """Bytes of rstd."""
    return 4 * sum(x.numel() // max(1, x.shape[-1]) for x in (q, k))


def _cost(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps, mode, *_) -> Cost:
    moved = sum(
        x.numel() * (x.element_size() + out_dtype(x, w, mode).itemsize) for x, w in ((q, q_weight), (k, k_weight))
    )
    return Cost(moved + _per_head(q, k) + table_bytes(cos, sin), 8 * (q.numel() + k.numel()))


def _cost_bwd(dy_q, dy_k, q: Tensor, k: Tensor, q_weight, k_weight, q_rstd, k_rstd, cos, sin, *flags: Any) -> Cost:
    n, need_dw = q.numel() + k.numel(), flags[-1]
    moved = n * (dy_q.element_size() + 2 * q.element_size()) + _per_head(q, k) + table_bytes(cos, sin)
    partials = 2 * 4 * q.shape[-1] * head_tiles(q, k, cos.shape[-1], q.shape[-1])[2] if need_dw else 0
    return Cost(moved + partials, (16 if need_dw else 14) * n)


QK_NORM_ROPE = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, str mode,"
    " bool interleaved) -> (Tensor y_q, Tensor y_k, Tensor q_rstd, Tensor k_rstd)",
    reference=_reference,
    fake=_fake,
    samples=_op_samples,
    cost=_cost,
    workloads=_workloads,
)
QK_NORM_ROPE_BWD = define(
    "qk_norm_rope_bwd(Tensor dy_q, Tensor dy_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd,"
    " Tensor k_rstd, Tensor cos, Tensor sin, str mode, bool interleaved, bool need_dw)"
    " -> (Tensor dq, Tensor dk, Tensor dw_q, Tensor dw_k)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    samples=_bwd_samples,
    cost=_cost_bwd,
    long_reduction=True,
    workloads=_bwd_workloads,
)


def _cpu(*args: Any):
    return _in_turn(ops.rms_norm, ops.rope, *args)


def _cpu_supports(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, *_: Any) -> str | None:
    return (
        "an empty dimension" if q.numel() == 0 or k.numel() == 0 else native.unsupported(q, k, q_weight, k_weight, cos)
    )


def _cpu_bwd(
    dy_q, dy_k, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, mode: str, interleaved: bool, need_dw: bool
):
    dn_q, dn_k = ops.rope(dy_q, dy_k, cos, sin, interleaved, True)
    dq, dw_q = ops.rms_norm_bwd(dn_q, None, q, q_weight, q_rstd, mode, need_dw)
    dk, dw_k = ops.rms_norm_bwd(dn_k, None, k, k_weight, k_rstd, mode, need_dw)
    return dq, dk, dw_q, dw_k


def _cpu_bwd_supports(dy_q: Tensor, dy_k: Tensor, *saved: Any) -> str | None:
    q, k, q_weight, k_weight, _, _, cos = saved[:7]
    return native.unsupported(dy_q, dy_k) or _cpu_supports(q, k, q_weight, k_weight, cos)


def _triton_supports(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos, sin, *_: Any) -> str | None:
    return heads_refusal(q, k, cos, sin, q_weight, k_weight)


def _triton_bwd_supports(dy_q: Tensor, dy_k: Tensor, *saved: Any) -> str | None:
    q, k, q_weight, k_weight, _, _, cos, sin = saved[:8]
    return heads_refusal(q, k, cos, sin, q_weight, k_weight, dy_q, dy_k)


implement(QK_NORM_ROPE, "cpu", _cpu, _cpu_supports)
implement(QK_NORM_ROPE_BWD, "cpu", _cpu_bwd, _cpu_bwd_supports)
implement(QK_NORM_ROPE, "triton", lazy("qk_norm_rope", "qk_norm_rope"), _triton_supports)
implement(QK_NORM_ROPE_BWD, "triton", lazy("qk_norm_rope", "qk_norm_rope_bwd"), _triton_bwd_supports)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, mode, interleaved):
        y_q, y_k, *rstd = ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, mode, interleaved)
        ctx.save_for_backward(q, k, q_weight, k_weight, *rstd, cos, sin)
        ctx.options = mode, interleaved
        return y_q, y_k

    @staticmethod
    @first_order
    def backward(ctx, dy_q, dy_k):
        need_q, need_k = ctx.needs_input_grad[2:4]
        gradients = ops.qk_norm_rope_bwd(dy_q, dy_k, *ctx.saved_tensors, *ctx.options, need_q or need_k)
        dq, dk, dw_q, dw_k = gradients
        return dq, dk, dw_q if need_q else None, dw_k if need_k else None, None, None, None, None, None


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, mode: str) -> None:
    op = "qk_norm_rope"
    checks.check_choice(op, "mode", mode, MODES)
    check_heads(op, q, k, cos, sin)
    checks.check_same_device(op, q=q, q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.check_float(op, name, weight)
        checks.check_ndim(op, name, weight, 1)
        checks.check_dim(op, name, weight, 0, q.shape[-1])
    if k_weight.dtype != q_weight.dtype:
        raise checks.fail(op, "k_weight.dtype", q_weight.dtype, k_weight.dtype, "give both norms one dtype")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    mode: str = "llama",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of q and k, then rotate them by their positions: ``rope(rms_norm(q), rms_norm(k))``.

    Args:
        q: [B, S, Hq, D], fp32, bf16, fp16 or fp64, any strides.
        k: [B, S, Hk, D], same dtype; Hk may differ from Hq.
        q_weight, k_weight: [D], one dtype; frozen weights cost nothing in backward.
        cos, sin: [B or 1, S, R], R <= D even, any float dtype; column j belongs to channel j, see rope.py.
        eps: added to the mean square of a head.
        mode: "llama" (Qwen3), "gemma" (Gemma 3) or "none"; see the module docstring for the rounding of each.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        (q', k'), contiguous, [B, S, Hq, D] and [B, S, Hk, D]; dtype promote(q, q_weight) in mode "llama", else q's.

    Raises:
        ValueError: shapes, dtypes, devices or a mode that do not fit.
    """
    _check(q, k, q_weight, k_weight, cos, sin, mode)
    return _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, eps, mode, interleaved)


def eager_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    mode: str = "llama",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stock PyTorch, as the transformers modules compute it."""
    q, k = eager_rms_norm(q, q_weight, eps, mode), eager_rms_norm(k, k_weight, eps, mode)
    return eager_rope(q, k, cos, sin, interleaved=interleaved)


def _function_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for i, (name, tensors, mode, interleaved) in enumerate(_heads(dtype, device, 2)):
        q, k, q_weight, k_weight, cos, sin = tensors
        trained = i % 4 < 2
        for x in (q, k, *((q_weight, k_weight) if trained else ())):
            x.requires_grad_()
        yield Sample(f"{name}-trained{trained:d}", (*tensors, 1e-6, mode, interleaved))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    cos, sin = tables(2, 6, 16, False, torch.float32, device)
    frozen, trained = (leaf(16), leaf(16)), (leaf(16).requires_grad_(), leaf(16).requires_grad_())
    packed = leaf(2, 6, 5 * 16).unflatten(-1, (5, 16))
    q, k = (x.requires_grad_() for x in (packed[:, :, :3], packed[:, :, 3:4]))
    yield Sample("packed-qkv-per-batch-positions-fp32-tables", (q, k, *trained, cos, sin))
    q, k = (leaf(2, heads, 6, 16).transpose(1, 2).requires_grad_() for heads in (3, 1))
    yield Sample("heads-first-one-weight-trained", (q, k, trained[0], frozen[1], cos.to(dtype), sin.to(dtype)))
    q = leaf(1, 6, 1, 16).expand(2, 6, 3, 16).requires_grad_()
    yield Sample("zero-stride", (q, leaf(2, 6, 1, 16).requires_grad_(), *frozen, cos.to(dtype), sin.to(dtype)))
    halves = leaf(1, 6, 16), leaf(1, 6, 16)
    yield Sample("halves-differ", (q, leaf(2, 6, 1, 16).requires_grad_(), *trained, *halves, 1e-5, "gemma"))
    long = leaf(2, 40, 9, 128).requires_grad_()  # several token blocks, the last one ragged, and head groups
    weights = leaf(128).requires_grad_(), leaf(128)
    yield Sample("blocks", (long, leaf(2, 40, 1, 128), *weights, *tables(1, 40, 128, False, dtype, device)))


function(qk_norm_rope, eager=eager_qk_norm_rope, samples=_function_samples, long_reduction=True)
