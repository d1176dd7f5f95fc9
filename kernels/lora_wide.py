"""LoRA linears in two precisions: a frozen base that multiplies in 16 bits under an fp32 input and fp32 adapters.

    Xb   = round(X),  Y_i = Xb W_i^T + bias_i, rounded and widened, + sum_j S_j (c_j B_j)^T,  S_j = drop_j(X) A_j^T
    dYb  = round(dY), dX  = sum_i dYb_i W_i, rounded and widened, + sum_j drop_j^T(dS_j A_j),  dS_j = dY_i (c_j B_j)
    dB_j = c_j dY_i^T S_j,  dA_j = dS_j^T drop_j(X)

This is what a 4-bit base behind ``peft.prepare_model_for_kbit_training`` computes: its residual stream and its adapters
are fp32, and every base linear casts its input to bf16 and its output back. X is rounded once for all projections and
their A's share one GEMM; the low-rank part is accumulated into the widened output in place, where stock makes a copy, a
product, its scaled copy and a sum.

Shapes as in lora.py: X [M, K], W_i [N_i, K], Y_i [M, N_i] in X's dtype. Saved for backward: X and the S_j.
Numerics: the base as in lora.py in its 16-bit dtype, everything else in X's.
Source: Dettmers et al. 2023, "QLoRA", eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import checks, lora_linear
from .first_order import first_order
from .lora import (
    LoRA,
    Projection,
    adapters,
    backward_weights,
    bias_grads,
    forward_weights,
    grad_x,
    kept_weights,
    low_rank_backward,
    no_autocast,
    project,
    shrink,
)
from .lora_ops import cast, columns, scaled_b
from .registry import Sample, function


def _bases(projections: Sequence[Projection]) -> list[Projection]:
    return [Projection(p.weight, p.bias) for p in projections]


def _add_low_rank(y: Tensor, s: Tensor | None, loras: Sequence[LoRA]) -> Tensor:
    """y += sum_j S_j (c_j B_j)^T + c_j bias_j; ``s`` are the columns of these adapters."""
    for lora in loras:
        if lora.bias is not None:
            y += lora.scaling * lora.bias
    if loras:
        assert s is not None
        y.addmm_(s, torch.cat([cast(scaled_b(lora.b, lora.scaling), y.dtype) for lora in loras], 1).t())
    return y


def _split_by_projection(s: Tensor | None, projections: Sequence[Projection]) -> list[Tensor | None]:
    if s is None:
        return [None] * len(projections)
    cols = columns([sum(lora.a.shape[0] for lora in adapters(p.lora)) for p in projections])
    return [s[:, col] for col in cols]


class _LoRALinearsWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base_dtype, static, *tensors):
        projections = lora_linear.unflatten(tensors, static)
        with no_autocast(x):
            x2 = lora_linear.rows(x)
            s = shrink(x2, projections)
            narrow = x2.to(base_dtype)
            weights = forward_weights(projections, narrow)
            ys = [y.to(x.dtype) for y in project(narrow, _bases(projections), None, weights)]
            parts = zip(ys, _split_by_projection(s, projections), projections, strict=True)
            outs = tuple(lora_linear.unrows(_add_low_rank(y, part, adapters(p.lora)), x) for y, part, p in parts)
        kept = kept_weights(projections, weights)
        ctx.save_for_backward(x2, s, *kept, *tensors)
        ctx.static, ctx.shape, ctx.base_dtype, ctx.kept = static, x.shape, base_dtype, len(kept)
        return outs

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        x2, s, *rest = ctx.saved_tensors
        weights, tensors = rest[: ctx.kept], rest[ctx.kept :]
        projections, needs = (
            lora_linear.unflatten(tensors, ctx.static),
            lora_linear.unflatten(ctx.needs_input_grad[3:], ctx.static),
        )
        need_dx, dx = ctx.needs_input_grad[0], None
        with no_autocast(x2):
            flat = [lora_linear.rows(dy) for dy in dys]
            low_dx = need_dx and s is not None
            dx, _, loras = low_rank_backward(flat, [], x2, projections, s, needs, low_dx)
            if need_dx:
                narrow = [dy.to(ctx.base_dtype) for dy in flat]
                base = grad_x(narrow, weights or backward_weights(projections, narrow[0]))
                dx = (base.to(x2.dtype) if dx is None else dx.add_(base)).view(ctx.shape)
            grads = []
            for dy, proj, need in zip(flat, projections, needs, strict=True):
                dbias, lora_biases = bias_grads(dy, proj.bias, adapters(proj.lora), need)
                mine, loras = loras[: len(lora_biases)], loras[len(lora_biases) :]
                parts = (grad._replace(bias=bias) for grad, bias in zip(mine, lora_biases, strict=True))
                grads.append(Projection(None, dbias, tuple(parts)))  # type: ignore[arg-type]
        return dx, None, None, *lora_linear.flatten(grads)[0]


def lora_linears_wide(x: Tensor, projections: Sequence[Projection], base_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``lora_linears`` with base products in ``base_dtype`` and the low-rank part in x's dtype; autocast is not asked.

    Args:
        x: [..., K], fp32 (or any float).
        projections: each with a frozen weight [N_i, K], dense or 4-bit.
        base_dtype: of the base's input, weights and output.

    Returns:
        One [..., N_i] per projection, of x's dtype.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability, or a weight that requires grad.
    """
    checks.check_rows("lora_linears_wide", "x", x)
    checks.check_choice("lora_linears_wide", "base_dtype", base_dtype, checks.FLOATS)
    for i, proj in enumerate(projections):
        lora_linear.check_projection("lora_linears_wide", f"projections[{i}]", x, proj)
        if isinstance(proj.weight, Tensor) and proj.weight.requires_grad:
            where = f"projections[{i}].weight.requires_grad"
            raise checks.fail("lora_linears_wide", where, False, True, "use lora_linears for a trained base")
    tensors, static = lora_linear.flatten([lora_linear.prepare(p, x) for p in projections])
    return _LoRALinearsWide.apply(x, base_dtype, static, *tensors)


def eager_lora_linears_wide(
    x: Tensor, projections: Sequence[Projection], base_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Stock PEFT on a 4-bit linear that casts its input; fp64 stays fp64, for that is the truth."""
    narrow = x if x.dtype == torch.float64 else x.to(base_dtype)
    return tuple(
        lora_linear.eager_lora_delta(lora_linear.eager_projection(narrow, p._replace(lora=None)).to(x.dtype), x, p.lora)
        for p in projections
    )


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    base = torch.bfloat16 if dtype == torch.float32 else dtype

    def make(n: int, k: int, rank: int | tuple[int, ...], **options) -> Projection:
        proj = lora_linear.sample_projection(dtype, device, n, k, rank, **options)
        bias = None if proj.bias is None else proj.bias.detach().to(base)
        return proj._replace(weight=proj.weight.detach().to(base), bias=bias)  # type: ignore[union-attr]

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    for rank in (1, 7, 64):
        yield Sample(f"rank{rank}", (x(2, 5, 40), [make(24, 40, rank)], base))
    yield Sample("one-row", (x(1, 40), [make(24, 40, 8, bias=True)], base))
    yield Sample("empty", (x(0, 40), [make(24, 40, 8)], base))
    yield Sample(
        "qkv", (x(3, 7, 40), [make(40, 40, 8, bias=True), make(20, 40, 4, lora_bias=True), make(20, 40, 16)], base)
    )
    yield Sample("q-and-v-only", (x(3, 7, 40), [make(40, 40, 8), make(20, 40, 0), make(20, 40, 8)], base))
    yield Sample("no-adapter", (x(3, 7, 40), [make(40, 40, 0)], base))
    yield Sample("dropout", (x(3, 7, 40), [make(40, 40, 8, p=0.3), make(20, 40, (4, 3), p=0.1), make(20, 40, 8)], base))
    columns_first = torch.randn(6, 4, 40, dtype=dtype, device=device).transpose(0, 1).requires_grad_()
    yield Sample("non-contiguous", (columns_first, [make(24, 40, 8)], base))


function(lora_linears_wide, eager=eager_lora_linears_wide, samples=_samples, long_reduction=True)
