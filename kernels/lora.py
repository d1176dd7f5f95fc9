"""LoRA linears that share an input: the forward, the exact backward, and the ops they are made of.

For projection i with frozen W_i [N_i, K], adapters A_i [r_i, K], B_i [N_i, r_i], scale s_i, input X [M, K]:

    S_i  = drop_i(X) A_i^T                      [M, r_i]    one skinny GEMM for all i without dropout
    Y_i  = X W_i^T + bias_i + S_i (s_i B_i)^T   [M, N_i]
    dS_i = dY_i (s_i B_i)                       [M, r_i]
    dB_i = s_i dY_i^T S_i                       [N_i, r_i]
    dA_i = dS_i^T drop_i(X)                     [r_i, K]    one skinny GEMM for all i without dropout
    dX   = sum_i dY_i W_i + drop_i^T(dS_i A_i)  [M, K]
    dbias_i = sum_m dY_i,  dW_i = dY_i^T X      only where they are trained

Saved for backward: X and the S_i (2r bytes per token in bf16; recomputing them would read X again), never a dropout
mask. Every projection has its own rank, scale, dropout, biases, or no adapter at all.

Numerics: GEMMs run in the compute dtype (autocast's, else X's) with fp32 accumulation; adapters of another dtype (PEFT
keeps fp32 adapters on a bf16 base) are cast once per call, r x (K + N) elements, instead of casting X, M x K; their
gradients have the adapters' dtype. Stock multiplies fp32 adapters in fp32 unless autocast rounds them. Rounding them to
bf16 would err the same way on every token, so they are *split*, A = A_hi + A_lo with both parts in bf16, and the parts
are stacked along the rank: 16 significant bits for GEMMs of rank 2r, whose time is the time to read X or dY anyway.
No atomics: same inputs give the same bits.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; the backward is the chain rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .registry import Cost, Sample, define


class LoRA(NamedTuple):
    """One adapter: a [r, K], b [N, r], scaling, dropout probability p, bias [N] or None (PEFT's lora_bias).

    ``seed`` names the dropout mask (see dropout.py); None until one is drawn. ``split``: a and b are wider than the
    compute dtype and enter GEMMs in two parts.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    p: float = 0.0
    bias: Tensor | None = None
    seed: Tensor | None = None
    split: bool = False


class Projection(NamedTuple):
    """A linear layer: weight [N, K], bias [N] or None, adapter or None."""

    weight: Tensor
    bias: Tensor | None = None
    lora: LoRA | None = None


class ProjectionGrads(NamedTuple):
    """Gradients in the order of a projection's tensors; None where not needed."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    lora_bias: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What GEMMs on x run in: the autocast dtype if autocast is on, else x's dtype."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switch autocast off: the code inside has cast everything already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _shrink(x: Tensor, a: Tensor) -> Tensor:
    return torch.mm(x, a.t())


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor) -> Tensor:
    # The low-rank part goes into the GEMM's own output: no second M x N tensor, no scale or add pass.
    return torch.nn.functional.linear(x, weight, bias).addmm_(s, b.t())


def _grad_s_b(dy: Tensor, s: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.mm(dy, b), torch.mm(dy.t(), s).to(dtype)


def _grad_a(ds: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mm(ds.t(), x).to(dtype)


def _grad_x(dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Tensor | None) -> Tensor:
    dx = torch.mm(dys[0], weights[0])
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, weight)
    return dx if ds is None else dx.addmm_(ds, a)


def _rand(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _shrink_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, k, r in ((1, 8, 1), (5, 24, 7), (33, 40, 16), (0, 8, 4)):
        yield Sample(f"{m}x{k}x{r}", (_rand(dtype, device, m, k), _rand(dtype, device, r, k)))


def _matmul_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, k, n, r in ((1, 8, 6, 1), (5, 24, 30, 7), (33, 40, 17, 16), (0, 8, 8, 4)):
        x, w, b = _rand(dtype, device, m, k), _rand(dtype, device, n, k), _rand(dtype, device, n, r)
        yield Sample(f"{m}x{k}x{n}x{r}", (x, w, None, _rand(dtype, device, m, r), b))
        yield Sample(f"{m}x{k}x{n}x{r}-bias", (x, w, _rand(dtype, device, n), _rand(dtype, device, m, 2 * r)[:, :r], b))


def _grad_s_b_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, n, r in ((1, 8, 1), (5, 30, 7), (33, 17, 16), (0, 8, 4)):
        s = _rand(dtype, device, m, 2 * r)[:, r:]
        yield Sample(f"{m}x{n}x{r}", (_rand(dtype, device, m, n), s, _rand(dtype, device, n, r), torch.float32))


def _grad_a_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _shrink_samples(dtype, device):
        x, a = sample.args
        yield Sample(sample.name, (_rand(dtype, device, x.shape[0], a.shape[0]), x, torch.float32))


def _grad_x_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, k, ns, r in ((1, 8, (6,), 1), (5, 24, (30, 10, 11), 7), (0, 8, (8,), 4)):
        dys, ws = [_rand(dtype, device, m, n) for n in ns], [_rand(dtype, device, n, k) for n in ns]
        yield Sample(f"{m}x{k}x{ns}", (dys, ws, None, None))
        yield Sample(f"{m}x{k}x{ns}x{r}", (dys, ws, _rand(dtype, device, m, r), _rand(dtype, device, r, k)))


def _cost(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


LORA_SHRINK = define(
    "lora_shrink(Tensor x, Tensor a) -> Tensor",
    reference=_shrink,
    fake=lambda x, a: x.new_empty(x.shape[0], a.shape[0]),
    samples=_shrink_samples,
    cost=lambda x, a: Cost(_cost(x, a), 2 * x.numel() * a.shape[0]),
    long_reduction=True,
)
LORA_MATMUL = define(
    "lora_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor b) -> Tensor",
    reference=_matmul,
    fake=lambda x, weight, bias, s, b: x.new_empty(x.shape[0], weight.shape[0]),
    samples=_matmul_samples,
    cost=lambda x, weight, bias, s, b: Cost(
        _cost(x, weight, s, b) + x.shape[0] * weight.shape[0] * x.element_size(),
        2 * x.shape[0] * weight.shape[0] * (weight.shape[1] + b.shape[1]),
    ),
    long_reduction=True,
)
LORA_GRAD_S_B = define(
    "lora_grad_s_b(Tensor dy, Tensor s, Tensor b, ScalarType dtype) -> (Tensor ds, Tensor db)",
    reference=_grad_s_b,
    fake=lambda dy, s, b, dtype: (
        dy.new_empty(dy.shape[0], b.shape[1]),
        dy.new_empty(dy.shape[1], s.shape[1], dtype=dtype),
    ),
    samples=_grad_s_b_samples,
    cost=lambda dy, s, b, dtype: Cost(_cost(dy, s, b), 4 * dy.numel() * b.shape[1]),
    long_reduction=True,
)
LORA_GRAD_A = define(
    "lora_grad_a(Tensor ds, Tensor x, ScalarType dtype) -> Tensor",
    reference=_grad_a,
    fake=lambda ds, x, dtype: x.new_empty(ds.shape[1], x.shape[1], dtype=dtype),
    samples=_grad_a_samples,
    cost=lambda ds, x, dtype: Cost(_cost(ds, x), 2 * x.numel() * ds.shape[1]),
    long_reduction=True,
)
LORA_GRAD_X = define(
    "lora_grad_x(Tensor[] dys, Tensor[] weights, Tensor? ds, Tensor? a) -> Tensor",
    reference=_grad_x,
    fake=lambda dys, weights, ds, a: dys[0].new_empty(dys[0].shape[0], weights[0].shape[1]),
    samples=_grad_x_samples,
    cost=lambda dys, weights, ds, a: Cost(
        _cost(*dys, *weights), sum(2 * dy.numel() * w.shape[1] for dy, w in zip(dys, weights, strict=True))
    ),
    long_reduction=True,
)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _parts(t: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """t = hi + lo, both in ``dtype``, stacked along the rank dimension."""
    hi = t.to(dtype)
    return torch.cat((hi, (t - hi).to(dtype)), dim=dim)


def _fold(parts: Tensor) -> Tensor:
    """[M, 2r] -> [M, r]: the products with hi and lo, added."""
    hi, lo = parts.chunk(2, dim=1)
    return hi + lo


def twice(s: Tensor, lora: LoRA) -> Tensor:
    """What meets a stacked (hi, lo) in a GEMM: s beside itself."""
    return torch.cat((s, s), dim=1) if lora.split else s


def compute_a(lora: LoRA, dtype: torch.dtype) -> Tensor:
    """A in the compute dtype: [r, K], or [2r, K] in two parts."""
    return _parts(lora.a, dtype, 0) if lora.split else _cast(lora.a, dtype)


def scaled_b(lora: LoRA, dtype: torch.dtype) -> Tensor:
    """s B in the compute dtype: [N, r], rounded once, or [N, 2r] in two parts."""
    scaled = lora.b if lora.scaling == 1.0 else lora.b * lora.scaling
    return _parts(scaled, dtype, 1) if lora.split else _cast(scaled, dtype)


def _combined_bias(proj: Projection, dtype: torch.dtype) -> Tensor | None:
    if proj.lora is None or proj.lora.bias is None:
        return None if proj.bias is None else _cast(proj.bias, dtype)
    scaled = proj.lora.bias * proj.lora.scaling
    return _cast(scaled if proj.bias is None else proj.bias + scaled, dtype)


def shared_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor | None:
    """The A's of all projections without dropout, stacked along the rank; None if there are none."""
    parts = [compute_a(p.lora, dtype) for p in projections if p.lora is not None and p.lora.p == 0.0]
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def shrink(x: Tensor, projections: Sequence[Projection]) -> list[Tensor | None]:
    """S_i [M, r_i] for each projection, None without adapter. Those without dropout come from one GEMM."""
    a = shared_a(projections, x.dtype)
    shared = None if a is None else torch.ops.fuselora.lora_shrink(x, a)
    out: list[Tensor | None] = []
    column = 0
    for _, _, lora in projections:
        if lora is None:
            out.append(None)
            continue
        if lora.p > 0.0:
            dropped = torch.ops.fuselora.dropout(x, lora.seed, lora.p)
            s = torch.ops.fuselora.lora_shrink(dropped, compute_a(lora, x.dtype))
        else:
            width = lora.a.shape[0] * (2 if lora.split else 1)
            s = shared[:, column : column + width]
            column += width
        out.append(_fold(s) if lora.split else s)
    return out


def project(x: Tensor, proj: Projection, s: Tensor | None) -> Tensor:
    """Y [M, N] of one projection from X [M, K] and its S."""
    weight, bias = _cast(proj.weight, x.dtype), _combined_bias(proj, x.dtype)
    if s is None:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.fuselora.lora_matmul(x, weight, bias, twice(s, proj.lora), scaled_b(proj.lora, x.dtype))


def output_grads(dy: Tensor, s: Tensor, lora: LoRA) -> tuple[Tensor, Tensor]:
    """(dS [M, r], dB [N, r]) of one adapter."""
    ds, db = torch.ops.fuselora.lora_grad_s_b(dy, s, scaled_b(lora, dy.dtype), lora.b.dtype)
    return (_fold(ds) if lora.split else ds), db.mul_(lora.scaling)


def delta_input_grad(ds: Tensor, lora: LoRA) -> Tensor:
    """dS A, masked again behind dropout: one adapter's part of dX."""
    dx = torch.mm(twice(ds, lora), compute_a(lora, ds.dtype))
    return dx if lora.p == 0.0 else torch.ops.fuselora.dropout(dx, lora.seed, lora.p)


def _input_grad(
    dys: Sequence[Tensor], projections: Sequence[Projection], dss: Sequence[Tensor | None], dtype: torch.dtype
) -> Tensor:
    """dX = sum_i dY_i W_i + dS_i A_i; the parts behind a dropout mask are masked again."""
    plain = [(ds, p.lora) for ds, p in zip(dss, projections, strict=True) if p.lora is not None and p.lora.p == 0.0]
    ds, a = _concat([twice(ds, lora) for ds, lora in plain]), shared_a(projections, dtype)
    dx = torch.ops.fuselora.lora_grad_x(list(dys), [_cast(p.weight, dtype) for p in projections], ds, a)
    for (_, _, lora), part in zip(projections, dss, strict=True):
        if lora is not None and lora.p > 0.0:
            dx.add_(delta_input_grad(part, lora))
    return dx


def _concat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _a_grads(
    x: Tensor, projections: Sequence[Projection], dss: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """dA_i = dS_i^T drop_i(X); those without dropout come from one GEMM."""
    grads: list[Tensor | None] = [None] * len(projections)
    shared = []
    for i, (_, _, lora) in enumerate(projections):
        if lora is None or not needs[i]:
            continue
        if lora.p > 0.0:
            dropped = torch.ops.fuselora.dropout(x, lora.seed, lora.p)
            grads[i] = torch.ops.fuselora.lora_grad_a(dss[i], dropped, lora.a.dtype)
        else:
            shared.append(i)
    if shared:
        dtype = projections[shared[0]].lora.a.dtype
        for i in shared[1:]:  # adapters of one input share their dtype in practice
            dtype = torch.promote_types(dtype, projections[i].lora.a.dtype)
        stacked = torch.ops.fuselora.lora_grad_a(_concat([dss[i] for i in shared]), x, dtype)
        for i, part in zip(shared, stacked.split([dss[i].shape[1] for i in shared]), strict=True):
            grads[i] = _cast(part, projections[i].lora.a.dtype)
    return grads


def projections_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | Callable[[Tensor], Tensor],
    projections: Sequence[Projection],
    ss: Sequence[Tensor | None],
    needs: Sequence[Sequence[bool]],
    need_dx: bool,
) -> tuple[Tensor | None, list[ProjectionGrads]]:
    """dX [M, K] and the parameter gradients of projections that share X.

    Args:
        dys: [M, N_i] each; None for an output that nobody used.
        x: [M, K], or a function that is given dX and returns X: the GLU's backward rebuilds H in the pass that consumes
            dH, so the down projection's H exists only from there on. Needs ``need_dx``.
        needs: per projection, in ProjectionGrads' order.
    """
    grads = [ProjectionGrads() for _ in projections]
    live = [i for i, dy in enumerate(dys) if dy is not None]
    if not live:
        return None, grads
    dys, ss = [dys[i] for i in live], [ss[i] for i in live]
    projections, needs = [projections[i] for i in live], [needs[i] for i in live]
    dtype = dys[0].dtype
    found, dss = [], []
    for dy, s, (_, bias, lora), need in zip(dys, ss, projections, needs, strict=True):
        ds = db = dbias = dlora_bias = None
        if need[1] or need[4]:
            column_sum = dy.sum(0, dtype=torch.promote_types(dtype, torch.float32))
            dbias = column_sum.to(bias.dtype) if need[1] else None
            dlora_bias = (column_sum * lora.scaling).to(lora.bias.dtype) if need[4] else None
        if lora is not None:
            ds, db = output_grads(dy, s, lora)
            db = db if need[3] else None
        dss.append(ds)
        found.append(ProjectionGrads(None, dbias, None, db, dlora_bias))
    dx = _input_grad(dys, projections, dss, dtype) if need_dx else None
    if not isinstance(x, Tensor):
        x = x(dx)
    das = _a_grads(x, projections, dss, [need[2] for need in needs])
    for i, dy, proj, need, da, grad in zip(live, dys, projections, needs, das, found, strict=True):
        dw = torch.mm(dy.t(), x).to(proj.weight.dtype) if need[0] else None
        grads[i] = grad._replace(weight=dw, a=da)
    return dx, grads
