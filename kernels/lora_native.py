"""The LoRA ops (lora_ops.py) on the CPU, each as few products of several terms (native_gemm.py).

A projection with its adapters is one product, and so is the input gradient of all projections of an input with
theirs: no scale, add or cast passes, no copies of fp32 adapters in two parts, one rounding. Adapters with dropout enter
products of their own, as in the references, since their input or their share of dX is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import lora_ops, native
from .lora_ops import columns
from .native_gemm import Term, adapter_terms, dense_refusal, gemm, rows_of
from .registry import implement, ops


def shrink(
    x: Tensor, a: Sequence[Tensor], seeds: Sequence[Tensor | None], ps: Sequence[float], splits: Sequence[bool]
) -> Tensor:
    ranks = [t.shape[0] for t in a]
    s, x = x.new_empty(x.shape[0], sum(ranks)), rows_of(x)
    if not any(ps) and len({t.dtype for t in a}) == 1 and len(set(splits)) == 1:
        joint = a[0] if len(a) == 1 else torch.cat(list(a))
        return gemm(adapter_terms(x, joint, False, 1.0, splits[0]), s.shape[1], out=s)
    for col, adapter, seed, p, split in zip(columns(ranks), a, seeds, ps, splits, strict=True):
        dropped = ops.dropout(x, seed, p) if p > 0.0 else x
        gemm(adapter_terms(dropped, adapter, False, 1.0, split), adapter.shape[0], out=s[:, col])
    return s


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], s: Tensor, b: Sequence[Tensor],
    scalings: Sequence[float], owners: Sequence[int], splits: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    x = rows_of(x)
    return project_terms(
        [Term(x, rows_of(w)) for w in weights], [w.shape[0] for w in weights], biases, s, b, scalings, owners, splits
    )


def project_terms(
    bases: Sequence[Term], widths: Sequence[int], biases: Sequence[Tensor | None], s: Tensor, b: Sequence[Tensor],
    scalings: Sequence[float], owners: Sequence[int], splits: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Every projection from its base term and those of its adapters."""
    cols, s, out = columns([t.shape[1] for t in b]), rows_of(s), []
    for i, (base, width, bias) in enumerate(zip(bases, widths, biases, strict=True)):
        terms = [base]
        for j, owner in enumerate(owners):
            if owner == i:
                terms += adapter_terms(s[:, cols[j]], b[j], False, scalings[j], splits[j])
        out.append(gemm(terms, width, bias=None if bias is None else rows_of(bias)))
    return out


def grad_s_b(
    dys: Sequence[Tensor], s: Tensor, b: Sequence[Tensor], scalings: Sequence[float], owners: Sequence[int],
    splits: Sequence[bool], need_db: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    ds = dys[0].new_empty(s.shape)
    dys, upright = [rows_of(dy) for dy in dys], s.t().contiguous() if any(need_db) else s
    cols, dbs = columns([t.shape[1] for t in b]), []
    for j, (col, owner) in enumerate(zip(cols, owners, strict=True)):
        dy, n = dys[owner], b[j].shape[0]
        gemm(adapter_terms(dy, b[j], True, scalings[j], splits[j]), b[j].shape[1], out=ds[:, col])
        terms = [Term(upright[col], dy, True)] if need_db[j] else []
        db = gemm(terms, n, alpha=scalings[j], dtype=b[j].dtype, transposed=True) if terms else b[j].new_empty(0)
        dbs.append(db)
    return ds, dbs


def grad_a(
    ds: Tensor, x: Tensor, a: Sequence[Tensor], seeds: Sequence[Tensor | None], ps: Sequence[float],
    need_da: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    cols, upright, x = columns([t.shape[0] for t in a]), ds.t().contiguous(), rows_of(x)
    if all(need_da) and not any(ps) and len({t.dtype for t in a}) == 1:
        joint = gemm([Term(upright, x, True)], x.shape[1], dtype=a[0].dtype)
        return [joint] if len(a) == 1 else list(torch.split_with_sizes_copy(joint, [t.shape[0] for t in a]))
    das = []
    for col, adapter, seed, p, need in zip(cols, a, seeds, ps, need_da, strict=True):
        if not need:
            das.append(adapter.new_empty(0))
            continue
        dropped = ops.dropout(x, seed, p) if p > 0.0 else x
        das.append(gemm([Term(upright[col], dropped, True)], x.shape[1], dtype=adapter.dtype))
    return das


def grad_x(
    dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Sequence[Tensor],
    seeds: Sequence[Tensor | None], ps: Sequence[float], splits: Sequence[bool],
) -> Tensor:  # fmt: skip
    bases = [Term(rows_of(dy), rows_of(w), True) for dy, w in zip(dys, weights, strict=True)]
    return grad_x_terms(bases, weights[0].shape[1] if weights else a[0].shape[1], ds, a, seeds, ps, splits)


def grad_x_terms(
    terms: list[Term], width: int, ds: Tensor | None, a: Sequence[Tensor], seeds: Sequence[Tensor | None],
    ps: Sequence[float], splits: Sequence[bool],
) -> Tensor:  # fmt: skip
    """The sum of the base terms and all adapters' shares; those with dropout are masked on top."""
    masked: list[int] = []
    if ds is not None:
        ds, cols = rows_of(ds), columns([t.shape[0] for t in a])
        masked = [j for j, p in enumerate(ps) if p > 0.0]
        shares = [adapter_terms(ds[:, cols[j]], a[j], True, 1.0, splits[j]) for j in range(len(a))]
        terms = terms + [term for j, share in enumerate(shares) if j not in masked for term in share]
    dx = gemm(terms, width) if terms else None
    for j in masked:
        share = ops.dropout(gemm(shares[j], width), seeds[j], ps[j])
        dx = share if dx is None else dx.add_(share)
    assert dx is not None
    return dx


def _refusal(rows: int, operands: Sequence[Tensor | None], adapters: Sequence[Tensor]) -> str | None:
    first: Tensor | None = None
    for t in operands:
        if t is not None:
            first = t if first is None else first
            if t.dtype is not first.dtype:
                return "inputs and weights have different dtypes"
    return dense_refusal(rows, first) or native.unsupported(*adapters)


implement(lora_ops.LORA_SHRINK, "cpu", shrink, lambda x, a, *_: _refusal(x.shape[0], [x], a))
implement(
    lora_ops.LORA_PROJECT, "cpu", project,
    lambda x, weights, biases, s, b, *_: _refusal(x.shape[0], [x, *weights, *biases, s], b),
)  # fmt: skip
implement(lora_ops.LORA_GRAD_S_B, "cpu", grad_s_b, lambda dys, s, b, *_: _refusal(s.shape[0], [*dys, s], b))
implement(lora_ops.LORA_GRAD_A, "cpu", grad_a, lambda ds, x, a, *_: _refusal(x.shape[0], [ds, x], a))
implement(
    lora_ops.LORA_GRAD_X, "cpu", grad_x,
    lambda dys, weights, ds, a, *_: _refusal((*dys, ds)[0].shape[0], [*dys, *weights, ds], a),
)  # fmt: skip
