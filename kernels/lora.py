"""LoRA linears that share an input: the forward and the exact backward, composed of the ops of lora_ops.py.

For projection i with frozen W_i [N_i, K], adapters A_j [r_j, K], B_j [N_i, r_j], scale c_j, input X [M, K]:

    S_j  = drop_j(X) A_j^T                            [M, r_j]    one skinny GEMM for all j without dropout
    Y_i  = X W_i^T + bias_i + sum_j S_j (c_j B_j)^T   [M, N_i]    j: the adapters of projection i
    dS_j = dY_i (c_j B_j)                             [M, r_j]
    dB_j = c_j dY_i^T S_j                             [N_i, r_j]
    dA_j = dS_j^T drop_j(X)                           [r_j, K]    one skinny GEMM for all j without dropout
    dX   = sum_i dY_i W_i + sum_j drop_j^T(dS_j A_j)  [M, K]
    dbias_i = sum_m dY_i,  dW_i = dY_i^T X            only where they are trained

Saved for backward: X, or what makes it again if it is a norm's output (saving.py), and the S_j (2r bytes per token in
bf16; recomputing them would read X again), never a dropout mask. Every adapter has its own rank, scale, dropout, bias
and dtype; a projection has any number of them.

Numerics: GEMMs run in the compute dtype (autocast's, else X's) with fp32 accumulation; adapters of another dtype (PEFT
keeps fp32 adapters on a bf16 base) are cast once per call, r x (K + N) elements, instead of casting X, M x K; their
gradients have the adapters' dtype. Stock multiplies fp32 adapters in fp32 unless autocast rounds them. Rounding them to
bf16 would err the same way on every token, so they are *split*, A = A_hi + A_lo with both parts in bf16: 16 significant
bits for twice the arithmetic of the skinny GEMMs, whose time is the time to read X or dY anyway.
No atomics: same inputs give the same bits.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3; the backward is the chain rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import lora_4bit
from .lora_ops import cast, columns, doubled, scaled_b, stacked
from .matmul_4bit import MATMUL_4BIT
from .nf4 import Quantized4bit
from .registry import ops
from .saving import recomputing, saving_is_free


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
    """A linear layer: weight [N, K], dense or 4-bit, bias [N] or None, and its active adapters: one, None or a tuple.

    Gradients come in the same record, each in its tensor's place and None where not needed; so do the flags that say
    which are needed.
    """

    weight: Tensor | Quantized4bit
    bias: Tensor | None = None
    lora: LoRA | tuple[LoRA, ...] | None = None


NOTHING = contextlib.nullcontext()


def adapters(lora: LoRA | tuple[LoRA, ...] | None) -> tuple[LoRA, ...]:
    """A projection's adapters as a tuple."""
    return () if lora is None else (lora,) if isinstance(lora, LoRA) else lora


def all_adapters(projections: Iterable[Projection]) -> tuple[list[LoRA], list[int]]:
    """The adapters of all projections in order, and the index of the projection that each belongs to."""
    loras: list[LoRA] = []
    owners: list[int] = []
    for i, proj in enumerate(projections):
        for lora in adapters(proj.lora):
            loras.append(lora)
            owners.append(i)
    return loras, owners


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where x is; torch refuses the question for meta tensors."""
    device = "cpu" if x.is_cpu else x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What GEMMs on x run in: the autocast dtype if autocast is on, else x's dtype."""
    return torch.get_autocast_dtype(x.device.type) if autocasting(x) else x.dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switch autocast off: the code inside has cast everything already."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else NOTHING


def _combined_bias(proj: Projection, dtype: torch.dtype) -> Tensor | None:
    parts = [lora.bias * lora.scaling for lora in adapters(proj.lora) if lora.bias is not None]
    if proj.bias is not None:
        parts.insert(0, proj.bias)
    return cast(sum(parts[1:], parts[0]), dtype) if parts else None


def shrink(x: Tensor, projections: Sequence[Projection]) -> Tensor | None:
    """S [M, sum r] of all adapters, None without any."""
    loras, _ = all_adapters(projections)
    if not loras:
        return None
    a, seeds = [lora.a for lora in loras], [lora.seed for lora in loras]
    return ops.lora_shrink(x, a, seeds, [lora.p for lora in loras], [lora.split for lora in loras])


def kept_weights(projections: Sequence[Projection], weights: Sequence[Tensor | None]) -> list[Tensor]:
    """The dense weights that a forward should save, because its backward follows at once or saving costs nothing."""
    dense = [weight for weight in weights if weight is not None]
    quantized = len(dense) == len(weights) and any(isinstance(p.weight, Quantized4bit) for p in projections)
    return dense if quantized and (saving_is_free() or recomputing()) else []


def dense_weight(weight: Tensor | Quantized4bit, dtype: torch.dtype) -> Tensor:
    """The weight in the compute dtype. A 4-bit one is dequantised here, and again in backward unless it was kept
    (``kept_weights``): always kept, it would take the memory that quantisation saved."""
    if isinstance(weight, Quantized4bit):
        return ops.dequantize_4bit(*weight.operands(), dtype)
    return cast(weight, dtype)


def as_it_is(rows: int, like: Tensor, weight: Tensor | Quantized4bit) -> bool:
    """Whether a product of so many rows takes this 4-bit weight without dequantising it first: on a GPU that of few
    rows (generation), on CPU any."""
    if not isinstance(weight, Quantized4bit) or like.device.type not in DISPATCH:
        return False
    x = like.new_empty(rows, weight.shape[1])
    key = DISPATCH[like.device.type]
    return MATMUL_4BIT.select(key, (x, *weight.operands(), None, False)) is not MATMUL_4BIT.reference


DISPATCH = {"cuda": "CUDA", "cpu": "CPU"}


def forward_weights(projections: Sequence[Projection], x: Tensor) -> list[Tensor | None]:
    """The weights in x's dtype; None for one that is met ``as_it_is``."""
    return [None if as_it_is(x.shape[0], x, p.weight) else dense_weight(p.weight, x.dtype) for p in projections]


def project(
    x: Tensor, projections: Sequence[Projection], s: Tensor | None, weights: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Y_i [M, N_i] from X [M, K] and S; ``weights`` are the ``forward_weights`` if they are there already."""
    weights = list(weights or forward_weights(projections, x))
    biases = [_combined_bias(p, x.dtype) for p in projections]
    absent = [i for i, weight in enumerate(weights) if weight is None]
    quantized = _quantized(projections) if x.is_cpu and len(absent) == len(weights) else []
    if s is None or (absent and not quantized):
        ys = [_base(x, *parts) for parts in zip(projections, weights, biases, strict=True)]
        return ys if s is None else _add_low_ranks(ys, s, projections)
    loras, owners = all_adapters(projections)
    b, scalings, splits = [lora.b for lora in loras], [lora.scaling for lora in loras], [lora.split for lora in loras]
    if quantized:
        return ops.lora_project_4bit(x, *lora_4bit.operands(quantized), biases, s, b, scalings, owners, splits)
    return ops.lora_project(x, weights, biases, s, b, scalings, owners, splits)


def _quantized(projections: Sequence[Projection]) -> list[Quantized4bit]:
    return [p.weight for p in projections if isinstance(p.weight, Quantized4bit)]


def route_mask(routes: Tensor, rows: int, ranks: Sequence[int]) -> Tensor:
    """[M, sum r], true where a row's own adapter has its columns of S: all that adapter-homogeneous rows need.

    S with the other columns at zero goes through the same GEMMs as S of several adapters at once, so the masked forward
    and backward are those of each row's own adapter. They cost K + sum r instead of K + r: 1.6 % for four of rank 16.

    Args:
        routes: [B] index of each sample's adapter, -1 for none; a sample has M / B rows.
    """
    owner = torch.repeat_interleave(
        torch.arange(len(ranks), device=routes.device), torch.tensor(list(ranks), device=routes.device)
    )
    return routes.repeat_interleave(rows // max(1, routes.numel())).unsqueeze(1) == owner


def _base(x: Tensor, proj: Projection, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        return torch.nn.functional.linear(x, weight, bias)
    assert isinstance(proj.weight, Quantized4bit)
    return ops.matmul_4bit(x, *proj.weight.operands(), bias, False)


def _add_low_rank(y: Tensor, s: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """y + sum_j S_j (c_j B_j)^T."""
    splits, ranks = [lora.split for lora in loras], [lora.b.shape[1] for lora in loras]
    wide = stacked([scaled_b(lora.b, lora.scaling) for lora in loras], splits, y.dtype, 1)
    return torch.addmm(y, doubled(s, ranks, splits, range(len(loras))), wide.t())


def _add_low_ranks(ys: Sequence[Tensor], s: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    ranks = [sum(lora.b.shape[1] for lora in adapters(p.lora)) for p in projections]
    parts = zip(ys, s.split(ranks, dim=1), projections, strict=True)
    return [_add_low_rank(y, part, adapters(p.lora)) if p.lora else y for y, part, p in parts]


def add_delta(y: Tensor, s: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """y + sum_j S_j (c_j B_j)^T + c_j bias_j for a base layer that has computed y [M, N] by itself."""
    parts = [lora.bias * lora.scaling for lora in loras if lora.bias is not None]
    return _add_low_rank(y + sum(parts[1:], parts[0]).to(y.dtype) if parts else y, s, loras)


def grad_x(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor] | Sequence[Quantized4bit],
    ds: Tensor | None = None,
    a: Sequence[Tensor] = (),
    seeds: Sequence[Tensor | None] = (),
    ps: Sequence[float] = (),
    splits: Sequence[bool] = (),
) -> Tensor:
    """``lora_grad_x`` with weights of one kind: dense, or 4-bit ones as they are."""
    low_rank = (ds, list(a), list(seeds), list(ps), list(splits))
    if weights and isinstance(weights[0], Quantized4bit):
        return ops.lora_grad_x_4bit(list(dys), *lora_4bit.operands(weights), *low_rank)  # type: ignore[arg-type]
    return ops.lora_grad_x(list(dys), list(weights), *low_rank)


def low_rank_backward(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor] | Sequence[Quantized4bit],
    x: Tensor | Callable[[Tensor, Tensor | None], Tensor],
    projections: Sequence[Projection],
    s: Tensor | None,
    needs: Sequence[Projection],
    need_dx: bool,
    routed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, list[LoRA]]:
    """(dX, X, each adapter's gradients but its bias's); ``weights`` is empty below an opaque base layer, ``routed`` the
    ``route_mask`` where rows have adapters of their own."""
    loras, owners = all_adapters(projections)
    wanted, _ = all_adapters(needs)
    a, ps, splits = [lora.a for lora in loras], [lora.p for lora in loras], [lora.split for lora in loras]
    seeds = [lora.seed for lora in loras]
    need_a, need_b = [bool(need.a) for need in wanted], [bool(need.b) for need in wanted]
    ds, dx = None, None
    das: list[Any] = [None] * len(loras)
    dbs: list[Any] = [None] * len(loras)
    if loras:
        b, scalings = [lora.b for lora in loras], [lora.scaling for lora in loras]
        ds, dbs = ops.lora_grad_s_b(list(dys), s, b, scalings, owners, splits, need_b)
        ds = ds if routed is None else ds * routed
    if need_dx:
        dx = grad_x(dys if weights else [], weights, ds, a, seeds, ps, splits)
    if not isinstance(x, Tensor):
        assert dx is not None
        x = x(dx, ds)
    if any(need_a):
        das = ops.lora_grad_a(ds, x, a, seeds, ps, need_a)
    grads = [
        LoRA(da if wants_a else None, db if wants_b else None)  # type: ignore[arg-type]
        for da, db, wants_a, wants_b in zip(das, dbs, need_a, need_b, strict=True)
    ]
    return dx, x, grads


def bias_grads(dy: Tensor, bias: Tensor | None, loras: Sequence[LoRA], need: Projection) -> tuple[Any, list[Any]]:
    """(dbias, each adapter's dbias) of one projection: column sums of dY, in fp32."""
    wanted = [bool(n.bias) for n in adapters(need.lora)]
    if not need.bias and not any(wanted):
        return None, [None] * len(wanted)
    total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    of_adapters = [
        (total * lora.scaling).to(lora.bias.dtype) if wants and lora.bias is not None else None
        for lora, wants in zip(loras, wanted, strict=True)
    ]
    return (total.to(bias.dtype) if need.bias and bias is not None else None), of_adapters


def projections_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | Callable[[Tensor, Tensor | None], Tensor],
    projections: Sequence[Projection],
    s: Tensor | None,
    needs: Sequence[Projection],
    need_dx: bool,
    weights: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, list[Projection]]:
    """dX [M, K] and the parameter gradients of projections that share X.

    Args:
        dys: [M, N_i] each; None for an output that nobody used.
        x: [M, K], or a function that is given dX and dS and returns X: the GLU's backward rebuilds H in the pass that
            consumes dH, so the down projection's H exists only from there on. Needs ``need_dx``.
        needs: flags in the tensors' places.
        weights: those of all projections in the compute dtype if they are there already.
    """
    nothing: Any = None
    grads = [Projection(nothing, None, (LoRA(nothing, nothing),) * len(adapters(p.lora))) for p in projections]
    live = [i for i, dy in enumerate(dys) if dy is not None]
    if not live:
        return None, grads
    if len(live) < len(dys):
        s = _live_columns(s, projections, live)
    used = [dy for dy in dys if dy is not None]
    projections, needs = [projections[i] for i in live], [needs[i] for i in live]
    weights = [weights[i] for i in live] if weights else []
    if need_dx and not weights:
        weights = backward_weights(projections, used[0])
    dx, x, lora_grads = low_rank_backward(used, weights if need_dx else [], x, projections, s, needs, need_dx)
    for i, dy, proj, need in zip(live, used, projections, needs, strict=True):
        loras = adapters(proj.lora)
        dw = torch.mm(dy.t(), x).to(proj.weight.dtype) if need.weight else nothing
        dbias, lora_biases = bias_grads(dy, proj.bias, loras, need)
        mine, lora_grads = lora_grads[: len(loras)], lora_grads[len(loras) :]
        parts = [LoRA(grad.a, grad.b, bias=bias) for grad, bias in zip(mine, lora_biases, strict=True)]
        grads[i] = Projection(dw, dbias, tuple(parts))
    return dx, grads


def backward_weights(projections: Sequence[Projection], dy: Tensor) -> list[Tensor] | list[Quantized4bit]:
    """The weights that dX meets: 4-bit ones if it takes all of them as they are, else dense ones."""
    if dy.device.type == "cpu" and all(as_it_is(dy.shape[0], dy, p.weight) for p in projections):
        return _quantized(projections)
    return [dense_weight(p.weight, dy.dtype) for p in projections]


def _live_columns(s: Tensor | None, projections: Sequence[Projection], live: Sequence[int]) -> Tensor | None:
    """The columns of S that belong to the live projections."""
    loras, owners = all_adapters(projections)
    kept = [col for col, owner in zip(columns([p.a.shape[0] for p in loras]), owners, strict=True) if owner in live]
    return torch.cat([s[:, col] for col in kept], dim=1) if s is not None and kept else None
