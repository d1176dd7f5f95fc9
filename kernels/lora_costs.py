"""Bytes and operations of the LoRA ops: every operand and result once; partial sums are written once and read once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .gpu import lora_plan
from .registry import Cost


def _nbytes(*groups: Tensor | None | Sequence[Tensor | None]) -> int:
    tensors = [t for group in groups for t in ([group] if group is None or isinstance(group, Tensor) else group)]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def shrink(x: Tensor, a: Sequence[Tensor], seeds, ps: Sequence[float], splits) -> Cost:
    (m, k), rank = x.shape, sum(t.shape[0] for t in a)
    cut = lora_plan.shrink(m, k, rank, len(a) if any(ps) else 1, x.element_size(), a[0].element_size())
    partials = 2 * lora_plan.partial_bytes(m, rank, cut.splits)
    return Cost(_nbytes(x, a) + m * rank * x.element_size() + partials, 2 * x.numel() * rank)


def project(x: Tensor, weights: Sequence[Tensor], biases, s: Tensor, b: Sequence[Tensor], *_: object) -> Cost:
    m, k = x.shape
    outs = m * sum(w.shape[0] for w in weights)
    return Cost(
        _nbytes(x, weights, biases, s, b) + outs * x.element_size(), 2 * k * outs + 2 * m * sum(t.numel() for t in b)
    )


def grad_s_b(dys: Sequence[Tensor], s: Tensor, b: Sequence[Tensor], scalings, owners, splits, need_db) -> Cost:
    trained = [t for t, need in zip(b, need_db, strict=True) if need]
    plan = lora_plan.grad_s_b(dys, b, owners, splits)
    partials = 2 * (plan.partials[0] + (plan.partials[1] if trained else 0))
    flops = 2 * s.shape[0] * sum(t.numel() for t in (*b, *trained))
    return Cost(_nbytes([dys[i] for i in plan.used], s, b, s, trained) + partials, flops)


def grad_a(ds: Tensor, x: Tensor, a: Sequence[Tensor], seeds, ps, need_da) -> Cost:
    (m, k), trained = x.shape, [t for t, need in zip(a, need_da, strict=True) if need]
    rank, dropout = sum(t.shape[0] for t in trained), any(p > 0.0 for p, need in zip(ps, need_da, strict=True) if need)
    cut = lora_plan.grad_a(m, k, rank, len(trained) if dropout else 1, x.element_size())
    partials = 2 * lora_plan.partial_bytes(k, rank, cut.splits)
    return Cost(_nbytes(ds, x, trained) + partials, 2 * m * sum(t.numel() for t in trained))


def grad_x(
    dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Sequence[Tensor], seeds, ps, splits
) -> Cost:
    like, k = (dys[0], weights[0].shape[1]) if weights else (ds, a[0].shape[1])
    assert like is not None
    flops = 2 * like.shape[0] * (sum(w.numel() for w in weights) + sum(t.numel() for t in a))
    passes = 3 if weights and any(ps) else 1  # masks are drawn outside the GEMM, which adds to what that wrote
    return Cost(_nbytes(dys, weights, ds, a) + passes * like.shape[0] * k * like.element_size(), flops)
