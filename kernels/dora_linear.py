"""A differentiable DoRA linear: each output's weight row keeps its direction from W + s B A and its length from m.

    norm_n = || W_n + s (B A)_n ||_2,  g = m / norm                 norm is a constant to autograd, as in the paper
    without dropout   u = x W^T + s (x A^T) B^T                     y = (u + bias) + (g - 1) u
    with dropout      z = x' W^T,  x' = drop(x)                     y = x W^T + bias + (g - 1) z + s (x' A^T) (g B)^T

Dropout makes the layer a sum of two: PEFT, whose formula this is, keeps x W^T and drops the input of everything that
adapting adds to it, (g - 1) x' W^T included. That takes a second base GEMM, forward and backward; g - 1 is small where
the magnitudes are near the norms, and so is the rounding error of what it multiplies.

    without           du = g dy,  dm = sum_m dy u / norm            then the backward of lora.py with du for dy
    with              dz = (g - 1) dy,  dS = dy (s g B),  P = s dy^T S
                      dB = g P,  dm = (sum_m dy z + sum_r P B) / norm,  dA = dS^T x'
                      dx = dy W + drop^T(dz W + dS A)

Shapes: x [..., K], W [N, K], A [r, K], B [N, r], m, bias, norm, g [N], y [..., N], u, z [M, N].
W may be a 4-bit weight: dequantised in forward, for the norm and the products; in backward it is met as it is
(``lora.as_it_is``), or dequantised again unless it was kept (``lora.kept_weights``).

Saved for backward: x, S and the norm as in lora.py, and u (z): 2 N bytes per token in bf16, only where m is trained.
Rebuilding it, or summing dy x^T over W, would cost a third base GEMM, and y, which often is saved by the next layer,
gives it back as (y - bias) / g only where no g is near zero.
Numerics: norm, g and dm in fp32 from unrounded adapters; GEMMs as in lora.py; u (z) and y are rounded once each.
Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dora import DORA_NORM
from .dropout import dropout_mask
from .first_order import first_order
from .lora import (
    LoRA,
    Projection,
    adapters,
    backward_weights,
    bias_grads,
    compute_dtype,
    dense_weight,
    grad_x,
    kept_weights,
    no_autocast,
    project,
    projections_backward,
    shrink,
)
from .lora_linear import check_projection, prepare_lora, rows, sample_projection, unrows
from .lora_ops import cast
from .nf4 import Quantized4bit
from .registry import Sample, function, ops

Needs = Sequence[bool]  # of weight, bias, a, b, seed, magnitude


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, flags, weight, bias, a, b, seed, magnitude):
        scaling, p, split, quantized = flags
        lora = LoRA(a, b, scaling, p, None, seed, split)
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            dense = weight if quantized is None else dense_weight(quantized, dtype)
            norm = ops.dora_norm(dense, a, b, scaling)
            s, u, y = (_forward if p == 0.0 else _forward_dropped)(x2, dense, bias, lora, magnitude / norm)
            out = unrows(y, x)
        if quantized is not None:
            weight = next(iter(kept_weights([Projection(quantized)], [dense])), None)
        ctx.save_for_backward(x2, s, u if ctx.needs_input_grad[8] else None, norm, weight, bias, a, b, seed, magnitude)
        ctx.flags, ctx.shape, ctx.dtype = flags, x.shape, x.dtype
        return out

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x2, s, u, norm, weight, bias, a, b, seed, magnitude = ctx.saved_tensors
        scaling, p, split, quantized = ctx.flags
        lora = LoRA(a, b, scaling, p, None, seed, split)
        need_x, _, _, *needs = ctx.needs_input_grad
        with no_autocast(x2):
            dy2 = rows(dy)
            if weight is None and need_x:
                (weight,) = backward_weights([Projection(quantized)], dy2)
            backward = _backward if lora.p == 0.0 else _backward_dropped
            dx, dw, da, db, dg = backward(dy2, x2, s, u, weight, lora, magnitude / norm, needs, need_x)
            if dg is not None and bias is not None and lora.p == 0.0:  # u + bias was saved
                dg = dg - bias * dy2.sum(0, dtype=dg.dtype)
            dbias, _ = bias_grads(dy2, bias, (), Projection(None, needs[1], ()))  # type: ignore[arg-type]
            dm = (dg / norm).to(magnitude.dtype) if needs[5] else None
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, dw, dbias, da, db, None, dm


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, g: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(S, u + bias, y) without dropout. y = (u + bias) + (g - 1) u is exactly the plain layer where g is 1 and B is 0,
    as after PEFT's initialisation; g u + bias rounds elsewhere than a GEMM with a bias."""
    projections = [Projection(weight, bias, lora)]
    s = shrink(x, projections)
    (u,) = project(x, projections, s)
    if bias is None:
        return s, u, ops.dora_scale(u, g, None, None)
    return s, u, ops.dora_scale(u, g - 1.0, (1.0 - g) * bias, u)


def _backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    u: Tensor | None,
    weight: Tensor | Quantized4bit,
    lora: LoRA,
    g: Tensor,
    needs: Needs,
    need_x: bool,
) -> tuple[Any, ...]:
    """(dx, dW, dA, dB, dg) without dropout."""
    if u is None:
        du, dg = ops.dora_scale(dy, g, None, None), None
    else:
        du, dg = ops.dora_scale_bwd(dy, u, g)
    need: Any = Projection(needs[0], None, LoRA(needs[2], needs[3]))  # type: ignore[arg-type]
    dx, (grads,) = projections_backward([du], x, [Projection(weight, None, lora)], s, [need], need_x)
    (adapter,) = adapters(grads.lora)
    return dx, grads.weight, adapter.a, adapter.b, dg


def _scaled_rows(b: Tensor, g: Tensor) -> Tensor:
    """g B, not rounded."""
    return b.to(g.dtype) * g[:, None]


def _forward_dropped(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, g: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(S, z, y) with dropout."""
    w = cast(weight, x.dtype)
    dropped = ops.dropout(x, lora.seed, lora.p)
    s = shrink(dropped, [Projection(weight, None, lora._replace(p=0.0, seed=None))])
    (base,) = project(x, [Projection(weight, bias, lora._replace(b=_scaled_rows(lora.b, g)))], s)
    z = torch.mm(dropped, w.t())
    return s, z, ops.dora_scale(z, g - 1.0, None, base)


def _backward_dropped(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    z: Tensor | None,
    weight: Tensor | Quantized4bit,
    lora: LoRA,
    g: Tensor,
    needs: Needs,
    need_x: bool,
) -> tuple[Any, ...]:
    """(dx, dW, dA, dB, dg) with dropout."""
    if z is None:
        dz, dg = ops.dora_scale(dy, g - 1.0, None, None), None
    else:
        dz, dg = ops.dora_scale_bwd(dy, z, g - 1.0)
    b = _scaled_rows(lora.b, g)
    need_product = needs[3] or dg is not None
    ds, (product,) = ops.lora_grad_s_b([dy], s, [b], [lora.scaling], [0], [lora.split], [need_product])
    db = (product * g[:, None]).to(lora.b.dtype) if needs[3] else None
    dg = None if dg is None else dg + (product * lora.b).sum(1)
    dx = da = dw = None
    if needs[2]:
        (da,) = ops.lora_grad_a(ds, x, [lora.a], [lora.seed], [lora.p], [True])
    if need_x:
        w = [cast(weight, dy.dtype) if isinstance(weight, Tensor) else weight]
        dropped = grad_x([dz], w, ds, [lora.a], [None], [0.0], [lora.split])
        dx = grad_x([dy], w).add_(ops.dropout(dropped, lora.seed, lora.p))
    if needs[0]:
        dw = torch.mm(dy.t(), x).addmm_(dz.t(), ops.dropout(x, lora.seed, lora.p)).to(weight.dtype)
    return dx, dw, da, db, dg


def dora_linear(
    x: Tensor, weight: Tensor | Quantized4bit, bias: Tensor | None, lora: LoRA, magnitude: Tensor
) -> Tensor:
    """A linear with a DoRA adapter; see the module docstring.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64. Under autocast everything is cast to the autocast dtype.
        weight: [N, K], dense or 4-bit; bias: [N] or None.
        lora: a [r, K], b [N, r], scaling, dropout; without a bias of its own.
        magnitude: [N], the lengths of the rows of the adapted weight.

    Returns:
        [..., N] in the compute dtype.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability, or an adapter with a bias.
    """
    checks.check_rows("dora_linear", "x", x)
    check_projection("dora_linear", "layer", x, Projection(weight, bias, lora))
    checks.check_float("dora_linear", "magnitude", magnitude)
    checks.check_ndim("dora_linear", "magnitude", magnitude, 1)
    checks.check_dim("dora_linear", "magnitude", magnitude, 0, weight.shape[0])
    checks.check_same_device("dora_linear", x=x, magnitude=magnitude)
    if lora.bias is not None:
        got = tuple(lora.bias.shape)
        raise checks.fail("dora_linear", "lora.bias", "None", got, "DoRA has no place for it; use the layer's bias")
    dtype = compute_dtype(x)
    lora = prepare_lora(lora, x, dtype)
    quantized = weight if isinstance(weight, Quantized4bit) else None
    flags = (float(lora.scaling), lora.p, lora.split, quantized)
    return _DoRALinear.apply(x, dtype, flags, None if quantized else weight, bias, lora.a, lora.b, lora.seed, magnitude)


def eager_dora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA, magnitude: Tensor) -> Tensor:
    """Stock PEFT: the base layer, then what DoRA adds to it, in the adapter's dtype; the mask is explicit."""
    result = torch.nn.functional.linear(x, weight, bias)
    inputs, wide = x.to(lora.a.dtype), weight.to(lora.a.dtype)
    norm = torch.linalg.norm(wide + lora.scaling * (lora.b @ lora.a), dim=1).detach()
    g = magnitude / norm
    if lora.p > 0.0:
        inputs = inputs * dropout_mask(lora.seed, x.shape, lora.p, x.device) * (1.0 / (1.0 - lora.p))
        base = torch.nn.functional.linear(inputs, wide)
    else:
        base = result if bias is None else result - bias
    low = torch.nn.functional.linear(torch.nn.functional.linear(inputs, lora.a), lora.b)
    return (result + (g - 1) * base + g * low * lora.scaling).to(result.dtype)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def x(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    def layer(n: int, k: int, rank: int, **options: Any) -> tuple[Any, ...]:
        weight, bias, lora = sample_projection(dtype, device, n, k, rank, **options)
        norm = DORA_NORM.reference(weight.detach(), lora.a.detach(), lora.b.detach(), lora.scaling)
        magnitude = (norm * (1.0 + 0.3 * torch.randn(n, device=device))).to(dtype).requires_grad_()
        return weight, bias, lora, magnitude

    for rank in (1, 7, 8, 64):
        yield Sample(f"rank{rank}", (x(2, 5, 40), *layer(24, 40, rank)))
    for p in (0.0, 0.3):
        name = "-dropout" if p else ""
        yield Sample(f"bias{name}", (x(3, 7, 40), *layer(24, 40, 8, bias=True, p=p)))
        yield Sample(f"trained-base{name}", (x(9, 40), *layer(24, 40, 4, bias=True, p=p, frozen=False)))
        yield Sample(f"one-row{name}", (x(1, 40), *layer(24, 40, 8, p=p)))
        yield Sample(f"empty{name}", (x(0, 40), *layer(24, 40, 8, p=p)))
        weight, bias, lora, magnitude = layer(24, 40, 8, p=p)
        yield Sample(f"frozen-magnitude{name}", (x(9, 40), weight, bias, lora, magnitude.detach()))
    columns = torch.randn(6, 4, 40, dtype=dtype, device=device).transpose(0, 1).requires_grad_()
    yield Sample("non-contiguous", (columns, *layer(24, 40, 8)))
    row = torch.randn(1, 40, dtype=dtype, device=device).expand(6, 40).requires_grad_()
    yield Sample("zero-stride", (row, *layer(24, 40, 8)))
    yield Sample("long", (x(257, 264), *layer(136, 264, 16, bias=True)))


function(dora_linear, eager=eager_dora_linear, samples=_samples, long_reduction=True)
