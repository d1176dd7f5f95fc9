"""The GEMMs of LoRA linears on a GPU: the candidates behind ``lora_project`` and ``lora_grad_x``, and which one runs.

    lora_project   Y_i = X W_i^T + bias_i + sum_{j of i} S_j (c_j B_j)^T     [M, N_i] each
    lora_grad_x    dX  = sum_i dY_i W_i + sum_j drop_j^T(dS_j A_j)           [M, K]

Candidates, for element size e and one adapter per projection:

* ``addmm``: one Triton launch writes the low-rank part of all outputs (lora_gemm.py, "expand"), then a library GEMM per
  weight accumulates on it (beta = 1). Adds 2 e M N bytes, one write and one read of the outputs. Adding the low-rank
  part *after* the GEMM moves as much, needs one more launch per projection and a cast of every fp32 adapter, and
  rounds the whole of X W^T once more instead of the small low-rank part. In bf16 with K = 512 the rms error, over that
  of a single rounding, is 1.00 against 1.41 with a low-rank part of 0.03 of the base and 1.04 against 1.38 with 0.3.
* ``triton``: one Triton GEMM for all weights that adds the low-rank part to its accumulator: no extra byte, one
  rounding.

``FUSELORA_LORA_GEMM`` forces one; else choices.json decides by architecture, dtype and shape, and ``addmm`` runs where
it is silent. A third candidate, the augmented GEMM, needs buffers that the engine does not have: lora_augmented.py.

More than three projections or adapters go in groups of three; a projection's further adapters are written first, and
the launch of its first one accumulates (one more rounding of the small part).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import choices
from .launch import capability
from .lora_gemm import SLOTS, Config
from .lora_gemm_launch import Part, Slot, aligned, default_config, dense, expand_config, launch_grad_x, launch_project

CANDIDATES = ("addmm", "triton")


def chosen(op: str, left: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[str, Config]:
    """The candidate that runs for these GEMMs' operands, and the tiles of a Triton GEMM.

    The table is asked for M rows, the N output features of all weights and their K input features. Rows that aren't
    aligned are left to ``addmm`` unless forced.
    """
    x, level = left[0], capability(left[0].device)
    rows_aligned = aligned([*left, *weights], [weight.shape[0] for weight in weights])
    sizes = x.shape[0], sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    choice = choices.choose(op, level, x.dtype, *sizes) if rows_aligned else None
    variant = os.environ.get(choices.ENV_GEMM) or (choice.variant if choice else CANDIDATES[0])
    if variant not in CANDIDATES:
        raise ValueError(
            f"{choices.ENV_GEMM}: expected {' or '.join(CANDIDATES)}, got {variant!r}; choose one or unset it"
        )
    if choice is not None and choice.variant == variant and choice.config is not None:
        return variant, Config(**choice.config)
    return variant, default_config(level, x.dtype, x.shape[0], rows_aligned)


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
) -> list[Tensor]:
    """The launcher of ``lora_project``."""
    variant, config = chosen("lora_project", [x], weights)
    if variant == "triton":
        return project_triton(x, weights, biases, s, b, scalings, owners, splits, config)
    return project_addmm(x, weights, biases, s, b, scalings, owners, splits)


def grad_x(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor | None,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    splits: Sequence[bool],
) -> Tensor:
    """The launcher of ``lora_grad_x``."""
    if weights:
        variant, config = chosen("lora_grad_x", dys, weights)
        if variant == "triton":
            return grad_x_triton(dys, weights, ds, a, seeds, ps, splits, config)
    return grad_x_addmm(dys, weights, ds, a, seeds, ps, splits)


def _accumulating(config: Config) -> Config:
    """A tile that is added to what its output holds keeps both in registers: 256 columns spilled on sm_100."""
    return config._replace(block_n=min(config.block_n, 128))


def _by_owner(
    s: Tensor, b: Sequence[Tensor], scalings: Sequence[float], owners: Sequence[int], splits: Sequence[bool], count: int
) -> list[list[Part]]:
    """Each projection's adapters."""
    owned: list[list[Part]] = [[] for _ in range(count)]
    lows = dense(s).split([t.shape[1] for t in b], dim=1) if b else ()
    for low, wide, scaling, owner, split in zip(lows, b, scalings, owners, splits, strict=True):
        owned[owner].append(Part(low, dense(wide), split, scaling))
    return owned


def _groups(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[begin : begin + SLOTS] for begin in range(0, len(items), SLOTS)]


def _expand(slots: Sequence[Slot], accumulate: bool) -> None:
    """The outputs start with the low-rank part and the bias."""
    ys = [slot.y for slot in slots]
    launch_project(None, slots, expand_config(ys[0].dtype, not aligned(ys)), accumulate)


def project_addmm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
) -> list[Tensor]:
    """The low-rank parts in one launch, then a library GEMM per projection on top of them."""
    owned = _by_owner(s, b, scalings, owners, splits, len(weights))
    ys = [torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    for turn in range(max(map(len, owned), default=0)):
        slots = [
            Slot(y, None, None if turn else bias, mine[turn])
            for y, bias, mine in zip(ys, biases, owned, strict=True)
            if turn < len(mine)
        ]
        for group in _groups(slots):
            _expand(group, accumulate=turn > 0)
    for y, weight, bias, mine in zip(ys, weights, biases, owned, strict=True):
        if mine:
            y.addmm_(x, weight.t())
        elif bias is None:
            torch.mm(x, weight.t(), out=y)
        else:
            torch.addmm(bias, x, weight.t(), out=y)
    return ys


def project_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
    config: Config,
) -> list[Tensor]:
    """One grouped GEMM per three projections whose accumulator starts with the low-rank part."""
    x = dense(x)
    owned = _by_owner(s, b, scalings, owners, splits, len(weights))
    ys = [torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    for group in _groups(list(zip(ys, map(dense, weights), biases, owned, strict=True))):
        further = max(len(mine) for *_, mine in group)
        for turn in range(1, further):  # writes every output of the group, so that all of them can be accumulated on
            slots = [Slot(y, None, None, mine[turn] if turn < len(mine) else None) for y, _, _, mine in group]
            _expand(slots, accumulate=turn > 1)
        slots = [Slot(y, weight, bias, mine[0] if mine else None) for y, weight, bias, mine in group]
        launch_project(x, slots, _accumulating(config) if further > 1 else config, accumulate=further > 1)
    return ys


def _adapters(
    ds: Tensor | None, a: Sequence[Tensor], seeds: Sequence[Tensor | None], ps: Sequence[float], splits: Sequence[bool]
) -> list[Part]:
    if ds is None:
        return []
    lows = dense(ds).split([t.shape[0] for t in a], dim=1)
    return [
        Part(low, dense(wide), split, 1.0, 0 if seed is None else int(seed), p)
        for low, wide, seed, p, split in zip(lows, a, seeds, ps, splits, strict=True)
    ]


def _empty_dx(dys: Sequence[Tensor], weights: Sequence[Tensor], ds: Tensor | None, a: Sequence[Tensor]) -> Tensor:
    like, k = (dys[0], weights[0].shape[1]) if weights else (ds, a[0].shape[1])
    assert like is not None
    return torch.empty(like.shape[0], k, dtype=like.dtype, device=like.device)


def _expand_x(dx: Tensor, parts: Sequence[Part]) -> None:
    """dX starts with the low-rank part of these adapters."""
    for i, group in enumerate(_groups(parts)):
        narrow = not aligned([dx]) or any(part.p > 0.0 for part in group)
        launch_grad_x(dx, [], [], group, expand_config(dx.dtype, narrow), accumulate=i > 0)


def grad_x_addmm(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor | None,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    splits: Sequence[bool],
) -> Tensor:
    """The low-rank part, masked behind dropout, in one launch, then a library GEMM per projection on top of it."""
    parts = _adapters(ds, a, seeds, ps, splits)
    dx = _empty_dx(dys, weights, ds, a)
    _expand_x(dx, parts)
    for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        if i or parts:
            dx.addmm_(dy, weight)
        else:
            torch.mm(dy, weight, out=dx)
    return dx


def grad_x_triton(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    ds: Tensor | None,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    splits: Sequence[bool],
    config: Config,
) -> Tensor:
    """One GEMM per three projections. Adapters behind dropout are written first: their masks' words would cost every
    tile of the GEMM registers."""
    parts = _adapters(ds, a, seeds, ps, splits)
    dx = _empty_dx(dys, weights, ds, a)
    fused = parts if weights and len(parts) <= SLOTS and all(part.p == 0.0 for part in parts) else []
    written = [] if fused else parts
    _expand_x(dx, written)
    pairs = [(dense(dy), dense(weight)) for dy, weight in zip(dys, weights, strict=True)]
    for i, group in enumerate(_groups(pairs)):
        dys_of_group, weights_of_group = zip(*group, strict=True)
        accumulate = bool(i or written)
        tiles = _accumulating(config) if accumulate else config
        launch_grad_x(dx, dys_of_group, weights_of_group, () if i else fused, tiles, accumulate)
    return dx
