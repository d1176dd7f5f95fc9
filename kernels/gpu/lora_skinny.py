"""Triton kernels for the skinny products over X of LoRA adapters that share it: S and dA.

    shrink   S_j  = drop_j(X) A_j^T      [M, r_j]
    grad_a   dA_j = dS_j^T drop_j(X)     [r_j, K]

for up to eight adapters j in one launch. Their A's (or dA's) are one matrix of sum r rows without being copied
together: row c lies in the adapter j with first[j] <= c < first[j + 1], and its address is chosen among eight pointers.
Without dropout a program handles all adapters, so X is read once. With dropout every adapter sees another X, so a
program handles one adapter; those of the same tile of X run together and share it through the L2 cache, and the masks
are drawn from (seed, row, column) as dropout.py defines them.

shrink: a program owns BLOCK_M rows and walks over K, or over one of SPLITS parts of K where rows are few.
grad_a: a program owns BLOCK_K columns and walks over M, or over one of SPLITS parts of M.
Parts leave fp32 partial sums for a second launch. The rank is the first dimension of both tiles, so that A may come
from registers, where fp32 adapters are rounded or split on the way: A = hi + lo, two products, see lora.py.

Bytes: X, A and S once, or dS, X and dA once, plus the partial sums twice; lora_plan.py chooses between them.
Numerics: fp32 accumulation, one rounding of S and of dA. Dropped values are rounded to X's dtype as dropout.py does. No
atomics: the same shapes give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold
from . import lora_plan
from .aot import Budget
from .launch import capability, launch
from .philox import keep_mask

ADAPTERS = 8  # pointers of one launch
SEEDS = [f"seed{j}" for j in range(ADAPTERS)]
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of a program


@triton.jit
def row_pointers(c, pointers, width, FIRST: tl.constexpr):
    """Addresses of the rows c of stacked row-major matrices [.., width]; matrix j begins at row FIRST[j]."""
    result = pointers[0] + c * width
    for j in tl.static_range(1, len(FIRST) - 1):
        result = tl.where(c >= FIRST[j], pointers[j] + (c - FIRST[j]) * width, result)
    return result


@triton.jit
def adapter(j, seeds, FIRST: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr):
    """(first row, end, dropout seed, limit, scale) of adapter j."""
    begin, end = tl.zeros((), tl.int64), tl.full((), FIRST[1], tl.int64)
    seed, limit = tl.cast(seeds[0], tl.int64), tl.full((), LIMITS[0], tl.int64)
    scale = tl.full((), SCALES[0], tl.float32)
    for i in tl.static_range(1, len(FIRST) - 1):
        begin, end = tl.where(j == i, FIRST[i], begin), tl.where(j == i, FIRST[i + 1], end)
        seed, limit = tl.where(j == i, tl.cast(seeds[i], tl.int64), seed), tl.where(j == i, LIMITS[i], limit)
        scale = tl.where(j == i, SCALES[i], scale)
    return begin, end, seed, limit, scale


@triton.jit
def dropped(tile, rows, column, K, seed, limit, scale, BLOCK_K: tl.constexpr, QUADS: tl.constexpr):
    """The tile of X after dropout, rounded to X's dtype."""
    keep = keep_mask(rows, column, K, seed, limit, BLOCK_K, QUADS)
    return tl.where(keep, tile.to(tl.float32) * scale, 0.0).to(tile.dtype)


@triton.jit(do_not_specialize=SEEDS)
def shrink_kernel(
    x, s, a0, a1, a2, a3, a4, a5, a6, a7, seed0, seed1, seed2, seed3, seed4, seed5, seed6, seed7, M, K, stride_x,
    FIRST: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S of BLOCK_M rows and, with DROPOUT, of one adapter; with SPLITS > 1 the partial sum of one part of K."""
    COUNT: tl.constexpr = len(FIRST) - 1
    RANK: tl.constexpr = FIRST[COUNT]
    GROUPS: tl.constexpr = COUNT if DROPOUT else 1
    group, part = tl.program_id(0) % GROUPS, tl.program_id(1)
    rows = (tl.program_id(0) // GROUPS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, end = tl.arange(0, BLOCK_R).to(tl.int64), RANK
    if DROPOUT:
        seeds = (seed0, seed1, seed2, seed3, seed4, seed5, seed6, seed7)
        begin, end, seed, limit, scale = adapter(group, seeds, FIRST, LIMITS, SCALES)
        c += begin
    inside, ks = c < end, tl.arange(0, BLOCK_K)
    known = tl.minimum(rows, M - 1)
    if ALIGNED:
        K, stride_x = K // 8 * 8, stride_x // 8 * 8
    a = row_pointers(c, (a0, a1, a2, a3, a4, a5, a6, a7), K, FIRST)[:, None] + ks[None, :]
    x += known[:, None] * stride_x + ks[None, :]
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k0 in range(part * span, tl.minimum((part + 1) * span, K), BLOCK_K):
        if EVEN:
            tile = tl.load(x + k0)
            wide = tl.load(a + k0, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(x + k0, mask=ks[None, :] < K - k0, other=0.0)
            wide = tl.load(a + k0, mask=inside[:, None] & (ks[None, :] < K - k0), other=0.0)
        if DROPOUT:
            tile = dropped(tile, known, k0, K, seed, limit, scale, BLOCK_K, QUADS)
        high = wide.to(tile.dtype)
        acc = tl.dot(high, tl.trans(tile), acc, input_precision="ieee")
        if SPLIT:
            low = (wide - high.to(tl.float32)).to(tile.dtype)
            acc = tl.dot(low, tl.trans(tile), acc, input_precision="ieee")
    out = s + (part.to(tl.int64) * M + rows)[None, :] * RANK + c[:, None]
    tl.store(out, acc.to(s.dtype.element_ty), mask=inside[:, None] & (rows[None, :] < M))


@triton.jit
def sum_kernel(parts, out, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum of parts[p, i] over p, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(SPLITS):
        acc += tl.load(parts + tl.cast(n, tl.int64) * p + i, mask=i < n, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < n)


@triton.jit(do_not_specialize=SEEDS)
def grad_a_kernel(
    ds, x, parts, da0, da1, da2, da3, da4, da5, da6, da7,
    seed0, seed1, seed2, seed3, seed4, seed5, seed6, seed7, M, K, stride_ds, stride_x,
    FIRST: tl.constexpr, COLUMN: tl.constexpr, LIMITS: tl.constexpr, SCALES: tl.constexpr, DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA of BLOCK_K columns and, with DROPOUT, of one adapter; with SPLITS > 1 the partial sum of one part of M.

    Adapter j has the rows FIRST[j] .. FIRST[j + 1] of the stacked dA and its columns of dS from COLUMN[j] on.
    """
    COUNT: tl.constexpr = len(FIRST) - 1
    RANK: tl.constexpr = FIRST[COUNT]
    GROUPS: tl.constexpr = COUNT if DROPOUT else 1
    group, part = tl.program_id(0) % GROUPS, tl.program_id(1)
    column = tl.program_id(0) // GROUPS * BLOCK_K
    c, end = tl.arange(0, BLOCK_R).to(tl.int64), RANK
    if DROPOUT:
        seeds = (seed0, seed1, seed2, seed3, seed4, seed5, seed6, seed7)
        begin, end, seed, limit, scale = adapter(group, seeds, FIRST, LIMITS, SCALES)
        c += begin
    inside, ks = c < end, column + tl.arange(0, BLOCK_K)
    shift = tl.zeros((BLOCK_R,), tl.int64) + COLUMN[0]
    for j in tl.static_range(1, COUNT):
        shift = tl.where(c >= FIRST[j], COLUMN[j] - FIRST[j], shift)
    span = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    begin, stop = part * span, tl.minimum((part + 1) * span, M)
    if ALIGNED:
        K, stride_x = K // 8 * 8, stride_x // 8 * 8
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m0 in range(begin, stop, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        present, far = rows < M, rows.to(tl.int64)
        left = tl.load(
            ds + far[None, :] * stride_ds + (c + shift)[:, None], mask=present[None, :] & inside[:, None], other=0.0
        )
        if EVEN:
            tile = tl.load(x + far[:, None] * stride_x + ks[None, :], mask=present[:, None], other=0.0)
        else:
            tile = tl.load(
                x + far[:, None] * stride_x + ks[None, :], mask=present[:, None] & (ks[None, :] < K), other=0.0
            )
        if DROPOUT:
            tile = dropped(tile, far, column, K, seed, limit, scale, BLOCK_K, QUADS)
        acc = tl.dot(left, tile, acc, input_precision="ieee")
    keep = inside[:, None] & (ks[None, :] < K)
    if SPLITS > 1:
        tl.store(parts + (part.to(tl.int64) * RANK + c)[:, None] * K + ks[None, :], acc, mask=keep)
    else:
        out = row_pointers(c, (da0, da1, da2, da3, da4, da5, da6, da7), K, FIRST)[:, None] + ks[None, :]
        tl.store(out, acc.to(da0.dtype.element_ty), mask=keep)


@triton.jit
def sum_rows_kernel(
    parts, out0, out1, out2, out3, out4, out5, out6, out7, K,
    FIRST: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the stacked outputs: the sum of its SPLITS partial sums, in order."""
    COUNT: tl.constexpr = len(FIRST) - 1
    c, ks = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(SPLITS):
        acc += tl.load(parts + (p * FIRST[COUNT] + c) * K + ks, mask=ks < K, other=0.0)
    out = row_pointers(c, (out0, out1, out2, out3, out4, out5, out6, out7), K, FIRST)
    tl.store(out + ks, acc.to(out0.dtype.element_ty), mask=ks < K)


def shared_bytes(device: torch.device) -> int:
    """Shared memory a program may have, less what Triton needs besides the pipeline's buffers."""
    return (SHARED[max(n for n in SHARED if n <= capability(device))] - 16) * 1024


def stages(stage_bytes: int, device: torch.device, most: int = 5) -> int:
    """Pipeline stages whose buffers fit, at least two."""
    return max(2, min(most, shared_bytes(device) // stage_bytes + 1))


def slots(items: Sequence[Any]) -> list[Any]:
    """Eight arguments, None behind the last."""
    return [*items, *[None] * (ADAPTERS - len(items))]


def unit_rows(t: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a contiguous copy."""
    return t if t.stride(1) == 1 else t.contiguous()


def _masks(seeds: Sequence[Tensor | None], ps: Sequence[float]) -> tuple[bool, list[int | None], dict[str, Any]]:
    """(any dropout, seeds, constants) of adapters."""
    dropout = any(p > 0.0 for p in ps)
    numbers = [0 if seed is None or p == 0.0 else int(seed) for seed, p in zip(seeds, ps, strict=True)]
    limits, scales = tuple(threshold(p) for p in ps), tuple(1.0 / (1.0 - p) for p in ps)
    return dropout, numbers if dropout else [], {"LIMITS": limits, "SCALES": scales, "DROPOUT": dropout}


def shrink(
    x: Tensor, a: Sequence[Tensor], seeds: Sequence[Tensor | None], ps: Sequence[float], splits: Sequence[bool]
) -> Tensor:
    """``lora_shrink``."""
    x, a = unit_rows(x), [t.contiguous() for t in a]
    (m, k), ranks = x.shape, [t.shape[0] for t in a]
    first = lora_plan.first_rows(ranks)
    dropout, numbers, constants = _masks(seeds, ps)
    groups = len(a) if dropout else 1
    block_r = lora_plan.padded(max(ranks) if dropout else first[-1])
    cut = lora_plan.shrink(m, k, first[-1], groups, x.element_size(), a[0].element_size())
    s = torch.empty(m, first[-1], dtype=x.dtype, device=x.device)
    out = s if cut.splits == 1 else torch.empty(cut.splits, m, first[-1], dtype=torch.float32, device=x.device)
    block_k = 64 if block_r <= 64 and x.element_size() == 2 else 32
    stage = block_k * (cut.block * x.element_size() + block_r * a[0].element_size())
    # Masks take registers, and on sm_120 the assembler spills a few of tiles that it could hold.
    roomy = k % block_k == 0 and not dropout and capability(x.device) < 120
    warps = 4 if block_r * block_k < (8192 if roomy else 4096) else 8
    options = {"num_warps": warps, "num_stages": stages(stage, x.device, 5 if k % block_k == 0 else 3)}
    launch(
        shrink_kernel,
        (lora_plan.ceil_div(m, cut.block) * groups, cut.splits),
        *(x, out, *slots(a), *slots(numbers), m, k, x.stride(0)),
        options=options,
        FIRST=first,
        SPLIT=splits[0],
        SPLITS=cut.splits,
        EVEN=k % block_k == 0,
        ALIGNED=k % 8 == 0 and x.stride(0) % 8 == 0,
        QUADS=k % 4 == 0,
        BLOCK_M=cut.block,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        **constants,
    )
    if cut.splits > 1:
        n, block = m * first[-1], 1024
        launch(
            sum_kernel,
            (lora_plan.ceil_div(n, block),),
            *(out, s, n),
            options={"num_warps": 4},
            SPLITS=cut.splits,
            BLOCK=block,
        )
    return s


def grad_a(
    ds: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    ps: Sequence[float],
    need_da: Sequence[bool],
) -> list[Tensor]:
    """``lora_grad_a``."""
    das = [
        torch.empty(t.shape if need else 0, dtype=t.dtype, device=t.device) for t, need in zip(a, need_da, strict=True)
    ]
    chosen = [j for j, need in enumerate(need_da) if need]
    if not chosen:
        return das
    ds, x = unit_rows(ds), unit_rows(x)
    (m, k), columns = x.shape, lora_plan.first_rows([t.shape[0] for t in a])
    first = lora_plan.first_rows([a[j].shape[0] for j in chosen])
    dropout, numbers, constants = _masks([seeds[j] for j in chosen], [ps[j] for j in chosen])
    groups = len(chosen) if dropout else 1
    block_r = lora_plan.padded(max(a[j].shape[0] for j in chosen) if dropout else first[-1])
    cut = lora_plan.grad_a(m, k, first[-1], groups, x.element_size())
    outs, split = slots([das[j] for j in chosen]), cut.splits > 1
    parts = torch.empty(cut.splits, first[-1], k, dtype=torch.float32, device=x.device) if split else None
    block_m = 64 if block_r <= 64 and x.element_size() == 2 else 32
    stage = block_m * (cut.block + block_r) * x.element_size()
    options = {"num_warps": 8 if block_r * cut.block > 8192 else 4, "num_stages": stages(stage, x.device)}
    launch(
        grad_a_kernel,
        (lora_plan.ceil_div(k, cut.block) * groups, cut.splits),
        *(ds, x, parts, *(slots([]) if split else outs), *slots(numbers), m, k, ds.stride(0), x.stride(0)),
        options=options,
        FIRST=first,
        COLUMN=tuple(columns[j] for j in chosen),
        SPLITS=cut.splits,
        EVEN=k % cut.block == 0,
        ALIGNED=k % 8 == 0 and x.stride(0) % 8 == 0,
        QUADS=k % 4 == 0,
        BLOCK_M=block_m,
        BLOCK_K=cut.block,
        BLOCK_R=block_r,
        **constants,
    )
    if split:
        grid, shape = (first[-1], lora_plan.ceil_div(k, 1024)), {"FIRST": first, "SPLITS": cut.splits, "BLOCK": 1024}
        launch(sum_rows_kernel, grid, *(parts, *outs, k), options={"num_warps": 4}, **shape)
    return das


# sum_kernel, 8 elements per thread: per part two 16-byte loads, eight additions, about four instructions of address and
# mask; at the end four roundings of a pair, a store and 30 instructions once: (8 * 14 + 5 + 30) / 8 = 18.4 for 8 parts.
# sum_rows_kernel: the same and the choice of a pointer, 6 instructions for each of at most 7 comparisons: 5 more.
BUDGETS: dict[str, Budget] = {
    "sum_kernel": Budget(lambda args: args["BLOCK"], 19),
    "sum_rows_kernel": Budget(lambda args: args["BLOCK"], 24),
}
