"""Triton GEMMs of LoRA linears whose accumulator takes the low-rank part in too, and that low-rank part alone.

For projections i = 0..2 that share X [M, K], each with frozen W_i [N_i, K] and at most one adapter per launch:

    project:  Y_i = X W_i^T + bias_i + S_i (c_i B_i)^T        [M, N_i], one launch for all i
    grad_x:   dX  = sum_i dY_i W_i + sum_j drop_j^T(dS_j A_j)  [M, K],   one launch

Without the GEMM part (``GEMM=False``: "expand") the same kernels write only the low-rank part, for a library GEMM to
accumulate on. ``ACCUMULATE`` adds to what the output holds already: further adapters of one projection.

Tiles: a program owns BLOCK_M x BLOCK_N of one output. ``project`` partitions the column tiles of all Y_i by tile index,
``grad_x`` walks the concatenated reduction dimension of all (dY_i, W_i) in one pipelined loop. Programs are ordered in
groups of GROUP_M row tiles, so that those that run together share rows of the activations and of the weights in L2.
Rows past M repeat the last row and are not stored; masks exist only on ragged edges.

Bytes: every operand once from memory, every output once to it. Nothing is saved.
The low-rank part comes after the reduction over K: the same fp32 accumulator in either order, but in front of it the
addresses of both parts live at once, and 128 x 256 tiles spilled on sm_80, 128 x 128 ones on sm_120.

Numerics: fp32 accumulation of everything, one rounding at the end. B is scaled in fp32, then rounded to the compute
dtype once, or with SPLIT enters as two parts hi + lo, two dots (fp32 adapters on a low-precision base; lora_ops.py).
No atomics.
Source: Zhu et al. 2025, "LoRAFusion", for cutting the graph at S instead of computing it in every tile; the rest is
the maths.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .aot import Budget
from .philox import keep_mask

SLOTS = 3  # projections, and adapters, of one launch
BLOCK_R = 16  # columns of S per step: the reduction depth of one tensor-core instruction


class Config(NamedTuple):
    """Tile sizes, the row tiles of an L2 group, warps and pipeline stages of a GEMM."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int


@triton.jit
def _pick(i, a, b, c, COUNT: tl.constexpr):
    """The i-th of COUNT scalars or pointers."""
    if COUNT == 1:
        return a
    elif COUNT == 2:
        return tl.where(i == 0, a, b)
    else:
        return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit
def _ends(n0, n1, n2, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Where the blocks of each of COUNT lengths end when they are counted through."""
    end0 = tl.cdiv(n0, BLOCK)
    end1, end2 = end0, end0
    if COUNT > 1:
        end1 = end0 + tl.cdiv(n1, BLOCK)
        end2 = end1
    if COUNT > 2:
        end2 = end1 + tl.cdiv(n2, BLOCK)
    return end0, end1, end2


@triton.jit
def _multiple(number, UNIT: tl.constexpr):
    """The same number, known to the compiler as a multiple of UNIT; by itself it learns of multiples of 16 alone."""
    if UNIT > 1:
        return number // UNIT * UNIT
    else:
        return number


@triton.jit
def _grouped(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Program id -> (row tile, column tile), GROUP_M row tiles at a time."""
    width = GROUP_M * tiles_n
    first = pid // width * GROUP_M
    size = min(tiles_m - first, GROUP_M)
    return first + pid % width % size, pid % width // size


@triton.jit
def _add_low_rank(
    acc, low, stride_low, rows, wide, stride_r, stride_c, cols, width, rank, scaling,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + low[rows, :rank] (scaling wide[:rank, cols]); ``wide`` is B transposed, or A.

    A GEMM's low-rank steps are pipelined in two stages: its blocks are few on a multiprocessor. The low-rank part alone
    has enough blocks to wait for each other, and on sm_100 no registers for a second stage.
    """
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=STAGES):
        ranks = r0 + tl.arange(0, BLOCK_R)
        inside = ranks < rank
        left = tl.load(low + rows[:, None] * stride_low + ranks[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(
            wide + ranks[:, None] * stride_r + cols[None, :] * stride_c,
            mask=inside[:, None] & (cols[None, :] < width),
            other=0.0,
        )
        full = right.to(tl.float32) * scaling
        high = full.to(left.dtype)
        acc = tl.dot(left, high, acc, input_precision="ieee")
        if SPLIT:
            acc = tl.dot(left, (full - high.to(tl.float32)).to(left.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def project_kernel(
    x, w0, w1, w2, y0, y1, y2, bias0, bias1, bias2, s0, s1, s2, b0, b1, b2,
    M, K, n0, n1, n2, bias_n0, bias_n1, bias_n2, r0, r1, r2, scaling0, scaling1, scaling2,
    stride_x, stride_w0, stride_w1, stride_w2, stride_s, stride_b0, stride_b1, stride_b2,
    COUNT: tl.constexpr, GEMM: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    EVEN_K: tl.constexpr, UNIT: tl.constexpr, UNIT_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of one Y_i. ``bias_n``: N_i where projection i has a bias, else 0. ``r``: 0 without adapter.

    UNIT divides K, the N_i and the strides of X and the W_i; UNIT_R the ranks and the strides of S and the B_i.
    """
    end0, end1, end2 = _ends(n0, n1, n2, BLOCK_N, COUNT)
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), end2, GROUP_M)
    i = (tile_n >= end0).to(tl.int32) + (tile_n >= end1).to(tl.int32)
    tile_n -= _pick(i, 0, end0, end1, COUNT)
    n = _multiple(_pick(i, n0, n1, n2, COUNT), UNIT)
    all_rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    all_cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = tl.minimum(all_rows, M - 1), tl.minimum(all_cols, n - 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GEMM:
        ks = tl.arange(0, BLOCK_K)
        K = _multiple(K, UNIT)
        x += rows[:, None] * _multiple(stride_x, UNIT) + ks[None, :]
        stride_w = _multiple(_pick(i, stride_w0, stride_w1, stride_w2, COUNT), UNIT)
        w = _pick(i, w0, w1, w2, COUNT) + cols[None, :] * stride_w + ks[:, None]
        for k0 in range(0, K, BLOCK_K):
            if EVEN_K:
                left, right = tl.load(x + k0), tl.load(w + k0)
            else:
                left = tl.load(x + k0, mask=ks[None, :] < K - k0, other=0.0)
                right = tl.load(w + k0, mask=ks[:, None] < K - k0, other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    scaling = _pick(i, scaling0, scaling1, scaling2, COUNT)
    low, wide = _pick(i, s0, s1, s2, COUNT), _pick(i, b0, b1, b2, COUNT)
    rank, stride_s = _multiple(_pick(i, r0, r1, r2, COUNT), UNIT_R), _multiple(stride_s, UNIT_R)
    stride_b = _multiple(_pick(i, stride_b0, stride_b1, stride_b2, COUNT), UNIT_R)
    acc = _add_low_rank(acc, low, stride_s, rows, wide, 1, stride_b, cols, n, rank, scaling, SPLIT, 1 + GEMM, BLOCK_R)
    if BIAS:
        bias = _pick(i, bias0, bias1, bias2, COUNT)
        bias_n = _pick(i, bias_n0, bias_n1, bias_n2, COUNT)
        acc += tl.load(bias + all_cols, mask=all_cols < bias_n, other=0.0).to(tl.float32)[None, :]
    y = _pick(i, y0, y1, y2, COUNT) + all_rows[:, None] * n + all_cols[None, :]
    inside = (all_rows[:, None] < M) & (all_cols[None, :] < n)
    if ACCUMULATE:
        acc += tl.load(y, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add_masked(
    acc, ds, stride_ds, rows, a, stride_a, first, K, rank, seed, limit, scale,
    DROP: tl.constexpr, QUADS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + drop^T(dS A) of one adapter; ``first`` is the tile's first column."""
    cols = first + tl.arange(0, acc.shape[1])
    if DROP:
        part = tl.zeros(acc.shape, tl.float32)
        part = _add_low_rank(part, ds, stride_ds, rows, a, stride_a, 1, cols, K, rank, 1.0, SPLIT, STAGES, BLOCK_R)
        keep = keep_mask(rows, first, K, seed, limit, acc.shape[1], QUADS)
        return acc + tl.where(keep, part * scale, 0.0)
    else:
        return _add_low_rank(acc, ds, stride_ds, rows, a, stride_a, 1, cols, K, rank, 1.0, SPLIT, STAGES, BLOCK_R)


@triton.jit(do_not_specialize=["seed0", "seed1", "seed2", "limit0", "limit1", "limit2"])
def grad_x_kernel(
    dx, dy0, dy1, dy2, w0, w1, w2, ds0, ds1, ds2, a0, a1, a2,
    M, K, n0, n1, n2, r0, r1, r2, seed0, seed1, seed2, limit0, limit1, limit2, scale0, scale1, scale2,
    stride_dy0, stride_dy1, stride_dy2, stride_w0, stride_w1, stride_w2, stride_ds, stride_a0, stride_a1, stride_a2,
    COUNT: tl.constexpr, ADAPTERS: tl.constexpr, DROPPED: tl.constexpr, GEMM: tl.constexpr, SPLIT: tl.constexpr,
    ACCUMULATE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, QUADS: tl.constexpr,
    UNIT: tl.constexpr, UNIT_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of dX [M, K]: columns in blocks of BLOCK_N, the reduction over all N_i in steps of BLOCK_K.

    Bit j of DROPPED: adapter j's part is masked by its dropout's words (see philox.py) and scaled by 1 / (1 - p).
    UNIT divides K, the N_i and the strides of the dY_i, W_i and A_j; UNIT_R the ranks and the stride of dS.
    """
    K, stride_ds = _multiple(K, UNIT), _multiple(stride_ds, UNIT_R)
    tile_m, tile_n = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    all_rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(all_rows, M - 1)
    first = tile_n.to(tl.int64) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GEMM:
        end0, end1, end2 = _ends(n0, n1, n2, BLOCK_K, COUNT)
        for step in range(0, end2):
            i = (step >= end0).to(tl.int32) + (step >= end1).to(tl.int32)
            ks = (step - _pick(i, 0, end0, end1, COUNT)) * BLOCK_K + tl.arange(0, BLOCK_K)
            n = _multiple(_pick(i, n0, n1, n2, COUNT), UNIT)
            stride_dy = _multiple(_pick(i, stride_dy0, stride_dy1, stride_dy2, COUNT), UNIT)
            stride_w = _multiple(_pick(i, stride_w0, stride_w1, stride_w2, COUNT), UNIT)
            dy = _pick(i, dy0, dy1, dy2, COUNT) + rows[:, None] * stride_dy + ks[None, :]
            w = _pick(i, w0, w1, w2, COUNT) + ks[:, None].to(tl.int64) * stride_w + cols[None, :]
            if EVEN_N:
                left = tl.load(dy)
            else:
                left = tl.load(dy, mask=ks[None, :] < n, other=0.0)
            if EVEN_N and EVEN_K:
                right = tl.load(w)
            else:
                right = tl.load(w, mask=(ks[:, None] < n) & (cols[None, :] < K), other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
    if ADAPTERS > 0:
        acc = _add_masked(acc, ds0, stride_ds, rows, a0, _multiple(stride_a0, UNIT), first, K,
                          _multiple(r0, UNIT_R), seed0, limit0, scale0,
                          DROPPED % 2 == 1, QUADS, SPLIT, 1 + GEMM, BLOCK_R)  # fmt: skip
    if ADAPTERS > 1:
        acc = _add_masked(acc, ds1, stride_ds, rows, a1, _multiple(stride_a1, UNIT), first, K,
                          _multiple(r1, UNIT_R), seed1, limit1, scale1,
                          DROPPED // 2 % 2 == 1, QUADS, SPLIT, 1 + GEMM, BLOCK_R)  # fmt: skip
    if ADAPTERS > 2:
        acc = _add_masked(acc, ds2, stride_ds, rows, a2, _multiple(stride_a2, UNIT), first, K,
                          _multiple(r2, UNIT_R), seed2, limit2, scale2,
                          DROPPED // 4 == 1, QUADS, SPLIT, 1 + GEMM, BLOCK_R)  # fmt: skip
    out = dx + all_rows[:, None] * K + cols[None, :]
    inside = (all_rows[:, None] < M) & (cols[None, :] < K)
    if ACCUMULATE:
        acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, acc.to(dx.dtype.element_ty), mask=inside)


BUDGETS: dict[str, Budget] = {}  # tensor cores bound the GEMMs, their own writes the low-rank part alone
