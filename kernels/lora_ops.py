"""The five ops of LoRA linears that share an input X [M, K], and their references; lora.py composes them.

Adapters j = 0..J-1 lie side by side along the rank in S and dS [M, sum r], in this order; adapter j belongs to
projection owners[j], and owners ascend. A projection may have several adapters, or none.

    lora_shrink     S_j  = drop_j(X) A_j^T                                    [M, r_j]
    lora_project    Y_i  = X W_i^T + bias_i + sum_{owners[j]=i} S_j (c_j B_j)^T   [M, N_i]
    lora_grad_s_b   dS_j = dY_i (c_j B_j),  dB_j = c_j dY_i^T S_j             [M, r_j], [N_i, r_j]
    lora_grad_a     dA_j = dS_j^T drop_j(X)                                   [r_j, K]
    lora_grad_x     dX   = sum_i dY_i W_i + sum_j drop_j^T(dS_j A_j)          [M, K]

Adapters enter as they are kept, fp32 or the compute dtype (that of X and dY): casting them is the implementation's
matter. ``splits[j]``: A_j and B_j are wider than the compute dtype and must not be rounded to it; the references then
multiply with two parts, hi = round(A) and lo = round(A - hi), stacked along the rank in one GEMM. ``seeds`` and ``ps``
are those of dropout.py, on the contiguous X. ``lora_grad_x`` without projections is the low-rank part alone (an opaque
base layer). Gradients nobody needs are empty tensors.

Bytes: every operand once and every result once; the masks are never stored.
Numerics: fp32 accumulation, S, dS, Y and dX in the compute dtype, dA and dB in their adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora_costs
from . import lora_samples as samples
from .gpu.launch import lazy, refusal
from .registry import define, implement, ops


def columns(ranks: Sequence[int]) -> list[slice]:
    """Where each adapter's columns are in S and dS."""
    slices, begin = [], 0
    for rank in ranks:
        slices.append(slice(begin, begin + rank))
        begin += rank
    return slices


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _split(t: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    """Copies, since an op may not return two views of one tensor."""
    return [t] if len(sizes) == 1 else torch.split_with_sizes_copy(t, list(sizes), dim)


def _or_empty(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [t.new_empty(0) if grad is None else grad for grad, t in zip(grads, like, strict=True)]


def scaled_b(b: Tensor, scaling: float) -> Tensor:
    return b if scaling == 1.0 else b * scaling


def stacked(matrices: Sequence[Tensor], splits: Sequence[bool], dtype: torch.dtype, dim: int) -> Tensor:
    """A's or B's in the compute dtype, side by side along the rank: all of them rounded, then what splits left."""
    if all(splits) and len({t.dtype for t in matrices}) == 1:  # five launches whatever their number
        joint = _cat(matrices, dim)
        rounded = cast(joint, dtype)
        return torch.cat((rounded, (joint - rounded).to(dtype)), dim)
    high = [cast(t, dtype) for t in matrices]
    low = [(t - h).to(dtype) for t, h, split in zip(matrices, high, splits, strict=True) if split]
    return _cat(high + low, dim)


def doubled(s: Tensor, ranks: Sequence[int], splits: Sequence[bool], chosen: Sequence[int]) -> Tensor:
    """The chosen adapters' columns of S or dS that meet ``stacked``: each adapter's, then again those of the split."""
    if len(chosen) == len(ranks) and not any(splits):
        return s
    cols = columns(ranks)
    if all(splits[j] for j in chosen) and list(chosen) == list(range(chosen[0], chosen[-1] + 1)):  # one slice of S
        part = s if len(chosen) == len(ranks) else s[:, cols[chosen[0]].start : cols[chosen[-1]].stop]
        return torch.cat((part, part), 1)
    return _cat([s[:, cols[j]] for j in chosen] + [s[:, cols[j]] for j in chosen if splits[j]], 1)


def _folded(products: Tensor, ranks: Sequence[int], splits: Sequence[bool]) -> Tensor:
    """Products with ``stacked`` [M, sum r + sum of the split r] -> [M, sum r]: those with the rests are added."""
    rank = sum(ranks)
    if not any(splits):
        return products
    high, low = products[:, :rank], products[:, rank:]
    if all(splits):
        return high + low
    high = high.contiguous()
    begin = 0
    for col, r, split in zip(columns(ranks), ranks, splits, strict=True):
        if split:
            high[:, col] += low[:, begin : begin + r]
            begin += r
    return high


def _shrink(
    x: Tensor, a: Sequence[Tensor], seeds: Sequence[Tensor | None], ps: Sequence[float], splits: Sequence[bool]
) -> Tensor:
    def low_rank(inputs: Tensor, chosen: Sequence[int]) -> Tensor:
        parts = [splits[j] for j in chosen]
        products = torch.mm(inputs, stacked([a[j] for j in chosen], parts, x.dtype, 0).t())
        return _folded(products, [a[j].shape[0] for j in chosen], parts)

    plain = [j for j, p in enumerate(ps) if p == 0.0]
    if len(plain) == len(a):
        return low_rank(x, plain)
    pieces: dict[int, Tensor] = {}
    if plain:
        pieces.update(zip(plain, low_rank(x, plain).split([a[j].shape[0] for j in plain], dim=1), strict=True))
    for j, p in enumerate(ps):
        if p > 0.0:
            pieces[j] = low_rank(ops.dropout(x, seeds[j], p), [j])
    return _cat([pieces[j] for j in range(len(a))], 1)


def _project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
) -> list[Tensor]:
    ranks, out = [t.shape[1] for t in b], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = torch.nn.functional.linear(x, weight, bias)
        if mine := [j for j, owner in enumerate(owners) if owner == i]:
            wide = stacked([scaled_b(b[j], scalings[j]) for j in mine], [splits[j] for j in mine], x.dtype, 1)
            # The low-rank part goes into the GEMM's own output: no second M x N tensor, no scale or add pass.
            y.addmm_(doubled(s, ranks, splits, mine), wide.t())
        out.append(y)
    return out


def _grad_s_b(
    dys: Sequence[Tensor],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    ranks = [t.shape[1] for t in b]
    cols = columns(ranks)
    dss: list[Tensor] = []
    dbs: list[Tensor | None] = [None] * len(b)
    for i, dy in enumerate(dys):
        mine = [j for j, owner in enumerate(owners) if owner == i]
        if not mine:
            continue
        parts = [splits[j] for j in mine]
        wide = stacked([scaled_b(b[j], scalings[j]) for j in mine], parts, dy.dtype, 1)
        dss.append(_folded(torch.mm(dy, wide), [ranks[j] for j in mine], parts))
        if trained := [j for j in mine if need_db[j]]:
            db = torch.mm(dy.t(), _cat([s[:, cols[j]] for j in trained], 1))
            for j, part in zip(trained, _split(db, [ranks[j] for j in trained], 1), strict=True):
                dbs[j] = part.to(b[j].dtype).mul_(scalings[j])
    return _cat(dss, 1), _or_empty(dbs, b)


def _grad_a(
    ds: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    need_da: Sequence[bool],
) -> list[Tensor]:
    ranks = [t.shape[0] for t in a]
    cols = columns(ranks)
    das: list[Tensor | None] = [None] * len(a)
    plain = [j for j, p in enumerate(ps) if p == 0.0 and need_da[j]]
    if plain:
        grads = torch.mm(doubled(ds, ranks, [False] * len(a), plain).t(), x)
        for j, part in zip(plain, _split(grads, [ranks[j] for j in plain], 0), strict=True):
            das[j] = cast(part, a[j].dtype)
    for j, p in enumerate(ps):
        if p > 0.0 and need_da[j]:
            dropped = ops.dropout(x, seeds[j], p)
            das[j] = cast(torch.mm(ds[:, cols[j]].t(), dropped), a[j].dtype)
    return _or_empty(das, a)


def _grad_x(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor | None,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    splits: Sequence[bool],
) -> Tensor:
    dx: Tensor | None = None
    for dy, weight in zip(dys, weights, strict=True):
        dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    if ds is None:
        assert dx is not None
        return dx
    ranks = [t.shape[0] for t in a]

    def factors(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        parts = [splits[j] for j in chosen]
        return doubled(ds, ranks, splits, chosen), stacked([a[j] for j in chosen], parts, ds.dtype, 0)

    if plain := [j for j, p in enumerate(ps) if p == 0.0]:
        left, right = factors(plain)
        dx = torch.mm(left, right) if dx is None else dx.addmm_(left, right)
    for j, p in enumerate(ps):
        if p > 0.0:
            part = ops.dropout(torch.mm(*factors([j])), seeds[j], p)
            dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx


def _fake_shrink(x: Tensor, a: Sequence[Tensor], *_: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(t.shape[0] for t in a))


def _fake_project(x: Tensor, weights: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weights]


def _fake_grad_s_b(dys: Sequence[Tensor], s: Tensor, b: Sequence[Tensor], scalings, owners, splits, need_db):
    dbs = [t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(b, need_db, strict=True)]
    return dys[0].new_empty(s.shape), dbs


def _fake_grad_a(ds: Tensor, x: Tensor, a: Sequence[Tensor], seeds, ps, need_da) -> list[Tensor]:
    return [t.new_empty(t.shape) if need else t.new_empty(0) for t, need in zip(a, need_da, strict=True)]


def _fake_grad_x(
    dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Sequence[Tensor], *_
) -> Tensor:
    like, k = (dys[0], weights[0].shape[1]) if weights else (ds, a[0].shape[1])
    assert like is not None
    return like.new_empty(like.shape[0], k)


LORA_SHRINK = define(
    "lora_shrink(Tensor x, Tensor[] a, Tensor?[] seeds, float[] ps, bool[] splits) -> Tensor",
    reference=_shrink,
    fake=_fake_shrink,
    samples=samples.small(samples.shrink),
    workloads=samples.real(samples.shrink),
    cost=lora_costs.shrink,
    long_reduction=True,
)
LORA_PROJECT = define(
    "lora_project(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor s, Tensor[] b, float[] scalings, int[] owners,"
    " bool[] splits) -> Tensor[]",
    reference=_project,
    fake=_fake_project,
    samples=samples.small(samples.project),
    workloads=samples.real(samples.project),
    cost=lora_costs.project,
    long_reduction=True,
)
LORA_GRAD_S_B = define(
    "lora_grad_s_b(Tensor[] dys, Tensor s, Tensor[] b, float[] scalings, int[] owners, bool[] splits, bool[] need_db)"
    " -> (Tensor ds, Tensor[] db)",
    reference=_grad_s_b,
    fake=_fake_grad_s_b,
    samples=samples.small(samples.grad_s_b),
    workloads=samples.real(samples.grad_s_b),
    cost=lora_costs.grad_s_b,
    long_reduction=True,
)
LORA_GRAD_A = define(
    "lora_grad_a(Tensor ds, Tensor x, Tensor[] a, Tensor?[] seeds, float[] ps, bool[] need_da) -> Tensor[]",
    reference=_grad_a,
    fake=_fake_grad_a,
    samples=samples.small(samples.grad_a),
    workloads=samples.real(samples.grad_a),
    cost=lora_costs.grad_a,
    long_reduction=True,
)
LORA_GRAD_X = define(
    "lora_grad_x(Tensor[] dys, Tensor[] weights, Tensor? ds, Tensor[] a, Tensor?[] seeds, float[] ps, bool[] splits)"
    " -> Tensor",
    reference=_grad_x,
    fake=_fake_grad_x,
    samples=samples.small_grad_x,
    workloads=samples.real(samples.grad_x),
    cost=lora_costs.grad_x,
    long_reduction=True,
)


def _skinny_refusal(x: Tensor, adapters: Sequence[Tensor], rank: int) -> str | None:
    """Why the skinny kernels cannot take these adapters. At rank R they do R operations per byte of X, twice that for
    split adapters; an H200 does 180 in the time of a byte."""
    if reason := refusal(x, *adapters, dot=True):
        return reason
    if len(adapters) > 8:
        return f"{len(adapters)} adapters share the input, one launch takes 8"
    if len({t.dtype for t in adapters}) > 1:
        return "the adapters have different dtypes"
    return "at ranks over 256 arithmetic bounds the product, and cuBLAS is as good" if rank > 256 else None


def _shrink_supports(x: Tensor, a: Sequence[Tensor], seeds, ps: Sequence[float], splits) -> str | None:
    ranks = [t.shape[0] for t in a]
    return _skinny_refusal(x, a, max(ranks) if any(ps) else sum(ranks))


def _grad_a_supports(ds: Tensor, x: Tensor, a: Sequence[Tensor], seeds, ps: Sequence[float], need_da) -> str | None:
    ranks = [t.shape[0] for t, need in zip(a, need_da, strict=True) if need] or [0]
    return _mixed(ds, x) or _skinny_refusal(x, a, max(ranks) if any(ps) else sum(ranks))


def _grad_s_b_supports(
    dys: Sequence[Tensor], s: Tensor, b: Sequence[Tensor], scalings, owners: Sequence[int], splits, need_db
) -> str | None:
    ranks = [sum(t.shape[1] for t, owner in zip(b, owners, strict=True) if owner == i) for i in set(owners)]
    if reason := _mixed(*dys, s) or _skinny_refusal(s, b, max(ranks)) or refusal(*dys, dot=True):
        return reason
    if len(ranks) > 4:
        return f"{len(ranks)} projections share the input, one launch takes 4"
    if max(ranks) > 32:
        return "at ranks over 32 partial sums of dS and dB cost as much as a second pass over dY: torch.mm is as good"
    return None


implement(LORA_SHRINK, "triton", lazy("lora_skinny", "shrink"), _shrink_supports)
implement(LORA_GRAD_S_B, "triton", lazy("lora_grad_s_b", "grad_s_b"), _grad_s_b_supports)
implement(LORA_GRAD_A, "triton", lazy("lora_skinny", "grad_a"), _grad_a_supports)


def _project_supports(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], s: Tensor, b: Sequence[Tensor], *_: object
) -> str | None:
    return refusal(x, *weights, *biases, s, *b, dot=True) or _mixed(x, *weights, s)


def _grad_x_supports(
    dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Sequence[Tensor], *_: object
) -> str | None:
    gemms = [*dys, *weights, *([] if ds is None else [ds])]
    return refusal(*gemms, *a, dot=True) or _mixed(*gemms)


def _mixed(*tensors: Tensor) -> str | None:
    return "inputs and weights have different dtypes" if len({t.dtype for t in tensors}) > 1 else None


implement(LORA_PROJECT, "triton", lazy("lora_matmul", "project"), _project_supports)
implement(LORA_GRAD_X, "triton", lazy("lora_matmul", "grad_x"), _grad_x_supports)
