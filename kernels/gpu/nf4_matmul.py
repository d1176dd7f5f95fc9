"""Triton kernels of matmul_4bit.py for few rows: the weight is dequantised inside the product.

    Y^T = W X^T + bias   [N, M]        dX^T = W^T dY^T   [K, M]

The weight is the left operand, so that its side of a tile fills tensor cores of 64 rows (Hopper's, Blackwell's) however
few rows X has; on Hopper the forward product takes the dequantised tile from registers. A program owns one tile of the
output, 64 outputs forward and 128 for dX, and at most 64 rows of X; it reads its codes once, by 16 bytes, looks them up
in shared memory and rounds the values to X's dtype: 10 instructions per weight with 16 rows on sm_90, 17 with 64. Where
tiles are few, the reduced dimension is split (nf4_plan.py) and a second kernel adds fp32 partial sums in order.

Shapes: K a multiple of 64, any N and M; block sizes and nested scales as in nf4.py. Bytes: codes, scales, X and Y once,
partial sums twice. Numerics: fp32 accumulation over weights of X's dtype, one rounding; fp32 X exactly, on FMA units.
Pipelined loads (two or three stages) cost 2 to 3 instructions per weight more and raise no occupancy: left out.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Budget
from .launch import capability, launch
from .nf4 import word_aligned
from .nf4_plan import plan


@triton.jit
def _weight_tile(
    data_ptr, absmax_ptr, table, absmax2_ptr, code2_ptr, offset_ptr, rows, word, chunks,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """W[rows, 8 word ... 8 (word + WORDS)] in DTYPE, from int64 row numbers. RUN words share a scale."""
    at = word + tl.arange(0, WORDS)
    words = tl.load(data_ptr.to(tl.pointer_type(tl.int32)) + (rows[:, None] * (chunks * 8) + at[None, :]))
    run = word + tl.arange(0, WORDS // RUN) * RUN
    block = (rows[:, None] * (chunks * 64) + run[None, :] * 8) // BLOCKSIZE
    scale = tl.load(absmax_ptr + block)
    if absmax2_ptr is not None:
        scale = tl.load(code2_ptr + scale.to(tl.int32)) * tl.load(absmax2_ptr + block // BLOCKSIZE2)
        scale += tl.load(offset_ptr)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, WORDS // RUN, RUN)), (BLOCK_N, WORDS))
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    nibbles = tl.reshape(tl.join(even, odd), (BLOCK_N * WORDS * 8,)) & 15
    values = tl.reshape(tl.gather(table, nibbles, 0), (BLOCK_N, WORDS, 8)) * scale[:, :, None]
    return tl.reshape(values.to(DTYPE), (BLOCK_N, WORDS * 8))


@triton.jit
def _product(
    out_ptr, x_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, bias_ptr,
    M, N, chunks, stride_x, steps,
    TRANSPOSE: tl.constexpr, PARTIAL: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    RUN: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of Y^T = W X^T (+ bias) or, with TRANSPOSE, of dX^T = W^T dY^T, or a partial sum of it.

    A row of W has ``chunks`` times 64 elements: so its rows are known to begin on 16 bytes.
    """
    K = chunks * 64
    RED: tl.constexpr = BLOCK_N if TRANSPOSE else WORDS * 8
    OUT: tl.constexpr = WORDS * 8 if TRANSPOSE else BLOCK_N
    width = K if TRANSPOSE else N
    depth = N if TRANSPOSE else K
    first = tl.program_id(0) * OUT
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += tl.minimum(m, M - 1)[:, None] * stride_x + tl.arange(0, RED)[None, :]
    table = tl.load(code_ptr + tl.arange(0, 16))
    acc = tl.zeros((OUT, BLOCK_M), tl.float32)
    begin = tl.program_id(2) * steps * RED
    for at in range(begin, tl.minimum(begin + steps * RED, depth), RED):
        if EVEN_N or not TRANSPOSE:
            x = tl.load(x_ptr + at)
        else:
            x = tl.load(x_ptr + at, mask=(at + tl.arange(0, RED))[None, :] < depth, other=0.0)
        rows = (at if TRANSPOSE else first) + tl.arange(0, BLOCK_N)
        if not EVEN_N:  # repeats the last row, times zeros or into columns that are not stored
            rows = tl.minimum(rows, N - 1)
        w = _weight_tile(
            data_ptr, absmax_ptr, table, absmax2_ptr, code2_ptr, offset_ptr, rows.to(tl.int64),
            (first if TRANSPOSE else at) // 8, chunks, BLOCKSIZE, BLOCKSIZE2, RUN,
            BLOCK_N, WORDS, x_ptr.dtype.element_ty,
        )  # fmt: skip
        acc = tl.dot(tl.trans(w) if TRANSPOSE else w, tl.trans(x), acc, input_precision="ieee")
    cols = first + tl.arange(0, OUT)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[:, None]
    inside = (m[:, None] < M) & (cols[None, :] < width)
    if PARTIAL:
        m += tl.program_id(2).to(tl.int64) * M
    tl.store(out_ptr + m[:, None] * width + cols[None, :], tl.trans(acc).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_partials(out_ptr, partial_ptr, bias_ptr, n, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out_i = sum of the SPLITS partial sums of element i, first to last, + bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLITS):
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        partial_ptr += n
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def matmul_4bit(
    x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None,
    offset: Tensor | None, blocksize: int, blocksize2: int, rows: int, cols: int, bias: Tensor | None, transpose: bool,
) -> Tensor:  # fmt: skip
    """The op's launcher."""
    x = x if x.stride(1) == 1 else x.contiguous()
    cut, m = plan(x, rows, cols, transpose), x.shape[0]
    width = cols if transpose else rows
    out = torch.empty(m, width, dtype=x.dtype, device=x.device)
    split = cut.splits > 1
    target = torch.empty(cut.splits, m, width, dtype=torch.float32, device=x.device) if split else out
    options = dict(num_warps=cut.warps, num_stages=1, enable_fp_fusion=False)
    if capability(x.device) >= 120 and cut.warps == 4:
        options["maxnreg"] = 168  # three blocks; by itself ptxas aims at four, 128 registers, and spills ten
    launch(
        _product,
        (triton.cdiv(width, cut.out_block(transpose)), triton.cdiv(m, cut.block_m), cut.splits),
        *(target, x, word_aligned(data), absmax, code, absmax2, code2, offset, None if split else bias),
        *(m, rows, cols // 64, x.stride(0), cut.steps),
        options=options,
        TRANSPOSE=transpose,
        PARTIAL=split,
        BLOCKSIZE=blocksize,
        BLOCKSIZE2=blocksize2,
        RUN=math.gcd(cols, blocksize, cut.words * 8) // 8,
        EVEN_N=rows % cut.block_n == 0,
        BLOCK_N=cut.block_n,
        WORDS=cut.words,
        BLOCK_M=cut.block_m,
    )
    if split:
        n = m * width
        tensors, grid = (out, target, bias), (triton.cdiv(n, 512),)
        launch(_sum_partials, grid, *tensors, n, width, options=dict(num_warps=2), SPLITS=cut.splits, BLOCK=512)
    return out


# Tensor cores and the issue rate bound the product. Sums, per thread of 8 elements, for each part: 8 additions, 2
# loads, a pointer and a mask 4; once: conversions 4, a store, addresses and masks 30. With two parts 4 per partial sum.
BUDGETS = {"_sum_partials": Budget(lambda args: args["BLOCK"] * args["SPLITS"], 5)}
