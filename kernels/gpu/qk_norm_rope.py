"""RMSNorm of every head of q and k and RoPE in one launch. Formulas: ``kernels/qk_norm_rope.py``.

Programs and tiles are those of ``rope.py``: ``TOKENS`` tokens, ``GROUP`` heads of q or of k, a head as pair halves a
and b (and c, the channels that are not rotated). The tables and the norm's weight are in registers for all heads of a
program; a head's sums go over BLOCK / 8 neighbouring threads.

Backward, trained weight: a program adds dn * xhat over its heads in registers, sums over its tokens at the end and
writes one row of partial sums; ``qk_dw_reduce`` adds the rows in their order. Same shapes, same bits.

Bytes: 2nb forward, 3nb backward, 4 per head for rstd; tables and weights come from L2. Numerics: fp32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rms_norm import out_dtype
from .aot import Budget
from .launch import launch
from .rope import (
    WARPS,
    channels,
    geometry,
    load_pairs,
    load_tables,
    place,
    rotate,
    store_pairs,
    strided,
    strided_rows,
    tables,
)

REDUCE_ROWS, REDUCE_COLUMNS = 128, 32


@triton.jit
def load_rest(rows, mask, HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """The channels behind the rotated ones, fp32 [TOKENS, REST]."""
    column = 2 * HALF + tl.arange(0, REST)[None, :]
    return tl.load(rows + column, mask=mask & (column < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def store_rest(rows, c, mask, HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    column = 2 * HALF + tl.arange(0, REST)[None, :]
    tl.store(rows + column, c.to(rows.dtype.element_ty), mask=mask & (column < WIDTH))


@triton.jit
def weigh(xhat, w, X: tl.constexpr, Y: tl.constexpr, LLAMA: tl.constexpr):
    """The normed channels as the norm alone would round them, fp32. ``w`` has Gemma's 1 added."""
    if LLAMA:
        return (xhat.to(X).to(tl.float32) * w).to(Y).to(tl.float32)
    return (xhat * w).to(X).to(tl.float32)


@triton.jit
def load_weight(
    w, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """w + SHIFT as (a, b, c), in every row; c is 0 if every channel is rotated."""
    w_a, w_b = load_pairs(w, mask, HALF, BLOCK, INTERLEAVED)
    w_c = 0.0
    if REST:
        w_c = load_rest(w, mask, HALF, REST, WIDTH) + SHIFT
    return w_a + SHIFT, w_b + SHIFT, w_c


@triton.jit
def qk_norm_rope_kernel(
    y_q, y_k, rstd_q, rstd_k, q, k, w_q, w_k, cos, sin,
    q_batch, q_token, q_head, k_batch, k_token, k_head, table_batch, table_token, length, eps,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    is_q, batch, position, _, first, _ = place(length, HEADS_Q, HEADS_K, GROUP, TOKENS)
    inside = position < length
    heads = tl.where(is_q, HEADS_Q, HEADS_K)
    x, head_stride = strided_rows(is_q, q, k, batch, position, q_batch, q_token, q_head, k_batch, k_token, k_head)
    row = (batch * length + position) * heads
    y = tl.where(is_q, y_q, y_k) + row * WIDTH
    rstds = tl.where(is_q, rstd_q, rstd_k) + row
    w = tl.where(is_q, w_q, w_k) + position * 0
    w_a, w_b, w_c = load_weight(w, inside, HALF, BLOCK, REST, WIDTH, INTERLEAVED, SHIFT)
    cos_a, cos_b, sin_a, sin_b = load_tables(
        cos, sin, batch, position, inside, table_batch, table_token, HALF, BLOCK, INTERLEAVED
    )
    X: tl.constexpr = q.dtype.element_ty
    Y: tl.constexpr = y_q.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    collected = tl.zeros((TOKENS, BLOCK), tl.float32)  # rstd of head i in column i: one store for all heads
    for i in tl.static_range(GROUP):
        mask = inside & (first + i < heads)
        x_rows, y_rows = x + (first + i) * head_stride, y + (first + i) * WIDTH
        a, b = load_pairs(x_rows, mask, HALF, BLOCK, INTERLEAVED)
        squares = tl.sum(a * a + b * b, 1, keep_dims=True)
        if REST:
            c = load_rest(x_rows, mask, HALF, REST, WIDTH)
            squares += tl.sum(c * c, 1, keep_dims=True)
        rstd = tl.rsqrt(squares * (1.0 / WIDTH) + eps)
        collected = tl.where(column == i, rstd, collected)
        a, b = weigh(a * rstd, w_a, X, Y, LLAMA), weigh(b * rstd, w_b, X, Y, LLAMA)
        a, b = rotate(a, b, cos_a, cos_b, sin_a, sin_b, False)
        store_pairs(y_rows, a, b, mask, HALF, BLOCK, INTERLEAVED)
        if REST:
            store_rest(y_rows, weigh(c * rstd, w_c, X, Y, LLAMA), mask, HALF, REST, WIDTH)
    tl.store(rstds + first + column, collected, mask=inside & (column < GROUP) & (first + column < heads))


@triton.jit
def seen(xhat, X: tl.constexpr, LLAMA: tl.constexpr):
    """xhat as the weight's gradient sees it."""
    if LLAMA:
        return xhat.to(X).to(tl.float32)
    return xhat


@triton.jit
def qk_norm_rope_bwd_kernel(
    dx_q, dx_k, part_q, part_k, dy_q, dy_k, q, k, rstd_q, rstd_k, w_q, w_k, cos, sin,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, q_batch, q_token, q_head, k_batch, k_token, k_head,
    table_batch, table_token, length,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, LLAMA: tl.constexpr,
    SHIFT: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    is_q, batch, position, block, first, group = place(length, HEADS_Q, HEADS_K, GROUP, TOKENS)
    inside = position < length
    heads = tl.where(is_q, HEADS_Q, HEADS_K)
    x, x_head = strided_rows(is_q, q, k, batch, position, q_batch, q_token, q_head, k_batch, k_token, k_head)
    dy, dy_head = strided_rows(
        is_q, dy_q, dy_k, batch, position, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head
    )
    row = (batch * length + position) * heads
    dx = tl.where(is_q, dx_q, dx_k) + row * WIDTH
    rstds = tl.where(is_q, rstd_q, rstd_k) + row
    w = tl.where(is_q, w_q, w_k) + position * 0
    w_a, w_b, w_c = load_weight(w, inside, HALF, BLOCK, REST, WIDTH, INTERLEAVED, SHIFT)
    cos_a, cos_b, sin_a, sin_b = load_tables(
        cos, sin, batch, position, inside, table_batch, table_token, HALF, BLOCK, INTERLEAVED
    )
    X: tl.constexpr = q.dtype.element_ty
    sum_a, sum_b = tl.zeros((TOKENS, BLOCK), tl.float32), tl.zeros((TOKENS, BLOCK), tl.float32)
    if REST:
        sum_c = tl.zeros((TOKENS, REST), tl.float32)
    for i in tl.static_range(GROUP):
        mask = inside & (first + i < heads)
        x_rows, dy_rows, dx_rows = x + (first + i) * x_head, dy + (first + i) * dy_head, dx + (first + i) * WIDTH
        rstd = tl.load(rstds + first + i, mask=mask, other=0.0)
        a, b = load_pairs(x_rows, mask, HALF, BLOCK, INTERLEAVED)
        dn_a, dn_b = load_pairs(dy_rows, mask, HALF, BLOCK, INTERLEAVED)
        dn_a, dn_b = rotate(dn_a, dn_b, cos_a, cos_b, sin_a, sin_b, True)
        a, b = a * rstd, b * rstd
        products = tl.sum(dn_a * w_a * a + dn_b * w_b * b, 1, keep_dims=True)
        if REST:
            c, dn_c = load_rest(x_rows, mask, HALF, REST, WIDTH) * rstd, load_rest(dy_rows, mask, HALF, REST, WIDTH)
            products += tl.sum(dn_c * w_c * c, 1, keep_dims=True)
        mean = products * (1.0 / WIDTH)
        dx_a, dx_b = (dn_a * w_a - a * mean) * rstd, (dn_b * w_b - b * mean) * rstd
        store_pairs(dx_rows, dx_a, dx_b, mask, HALF, BLOCK, INTERLEAVED)
        sum_a += dn_a * seen(a, X, LLAMA)
        sum_b += dn_b * seen(b, X, LLAMA)
        if REST:
            store_rest(dx_rows, (dn_c * w_c - c * mean) * rstd, mask, HALF, REST, WIDTH)
            sum_c += dn_c * seen(c, X, LLAMA)
    if DW:
        groups_q: tl.constexpr = (HEADS_Q + GROUP - 1) // GROUP
        groups_k: tl.constexpr = (HEADS_K + GROUP - 1) // GROUP
        part = tl.where(is_q, part_q, part_k)
        part += (block.to(tl.int64) * tl.where(is_q, groups_q, groups_k) + group) * WIDTH
        part += tl.zeros((1, 1), tl.int64)
        every = tl.full((1, 1), True, tl.int1)
        a, b = tl.sum(sum_a, 0, keep_dims=True), tl.sum(sum_b, 0, keep_dims=True)
        store_pairs(part, a, b, every, HALF, BLOCK, INTERLEAVED)
        if REST:
            store_rest(part, tl.sum(sum_c, 0, keep_dims=True), every, HALF, REST, WIDTH)


@triton.jit
def qk_dw_reduce(
    dw_q, dw_k, part_q, part_k, rows_q, rows_k, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums of the rows of part_q [rows_q, WIDTH] and of part_k, each by programs of its own."""
    is_q = tl.program_id(1) == 0
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < WIDTH
    count = tl.where(is_q, rows_q, rows_k)
    part = tl.where(is_q, part_q, part_k)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        sums += tl.load(part + row.to(tl.int64) * WIDTH + column, mask=(row < count) & inside, other=0.0)
    dw = tl.where(is_q, dw_q, dw_k)
    tl.store(dw + column, tl.sum(sums, 0, keep_dims=True).to(dw.dtype.element_ty), mask=inside)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    mode: str,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, q_weight, k_weight = strided(q), strided(k), q_weight.contiguous(), k_weight.contiguous()
    cos, sin, table_strides = tables(cos, sin)
    y_q, y_k = (torch.empty(x.shape, dtype=out_dtype(x, q_weight, mode), device=x.device) for x in (q, k))
    q_rstd, k_rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for x in (q, k))
    programs, constants = geometry(q, k, cos.shape[-1], q.shape[-1])
    launch(
        qk_norm_rope_kernel,
        (programs,),
        *(y_q, y_k, q_rstd, k_rstd, q, k, q_weight, k_weight, cos, sin),
        *(*q.stride()[:3], *k.stride()[:3], *table_strides, q.shape[1], eps),
        options={"num_warps": WARPS},
        INTERLEAVED=interleaved,
        LLAMA=mode == "llama",
        SHIFT=1.0 if mode == "gemma" else 0.0,
        **constants,
    )
    return y_q, y_k, q_rstd, k_rstd


def qk_norm_rope_bwd(
    dy_q: Tensor,
    dy_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    mode: str,
    interleaved: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy_q, dy_k, q, k = map(strided, (dy_q, dy_k, q, k))
    q_weight, k_weight, q_rstd, k_rstd = (x.contiguous() for x in (q_weight, k_weight, q_rstd, k_rstd))
    cos, sin, table_strides = tables(cos, sin)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    programs, constants = geometry(q, k, cos.shape[-1], q.shape[-1])
    groups_q, groups_k = (triton.cdiv(x.shape[2], constants["GROUP"]) for x in (q, k))
    blocks, width = programs // (groups_q + groups_k), q.shape[-1]
    parts = [
        torch.empty(blocks * groups, width, dtype=torch.float32, device=q.device) if need_dw else None
        for groups in (groups_q, groups_k)
    ]
    launch(
        qk_norm_rope_bwd_kernel,
        (programs,),
        *(dq, dk, *parts, dy_q, dy_k, q, k, q_rstd, k_rstd, q_weight, k_weight, cos, sin),
        *(stride for x in (dy_q, dy_k, q, k) for stride in x.stride()[:3]),
        *(*table_strides, q.shape[1]),
        options={"num_warps": WARPS},
        INTERLEAVED=interleaved,
        LLAMA=mode == "llama",
        SHIFT=1.0 if mode == "gemma" else 0.0,
        DW=need_dw,
        **constants,
    )
    if not need_dw:
        return dq, dk, q.new_empty(0), q.new_empty(0)
    dw_q, dw_k = torch.empty_like(q_weight), torch.empty_like(k_weight)
    launch(
        qk_dw_reduce,
        (triton.cdiv(width, REDUCE_COLUMNS), 2),
        *(dw_q, dw_k, *parts, blocks * groups_q, blocks * groups_k),
        options={"num_warps": WARPS},
        WIDTH=width,
        ROWS=REDUCE_ROWS,
        COLUMNS=REDUCE_COLUMNS,
    )
    return dq, dk, dw_q, dw_k


# Instructions per channel on sm_90 in bf16, counted before compiling: 8 pairs per thread and head as in rope.py, a bf16
# conversion 1.5. Forward: load 1.5, square 1, xhat 1, round and back 2, weigh 1, round and back 2, rotate 2, pack 0.5:
# 11; per head the sum over 8 threads 6, rsqrt and rstd 8, accesses and addresses 20: 2.1; tables and weights, 48
# conversions, and 80 for the place: 1 over 8 heads, 2 over 4. Sum 14.1 and 15.1, compiled 15.1 and 16.2.
# Backward: two loads 3, rotate 2, xhat 1, g 1, products 1, dx 2, pack 0.5: 10.5; per head 40: 2.5; tables 1 or 2. Sum
# 14 and 15, compiled 15.2 and 16.4. The trained weight adds round and back 2, sums 1, and their sums over tokens 0.8:
# 17.8 and 18.8, compiled 20.1, as the 16 sums of a thread meet in shared memory.
# qk_dw_reduce: a load 0.25, an add 1, a mask 1, and the sum over 128 rows 2.
BUDGETS = {
    "qk_norm_rope_kernel": Budget(channels, 16.5),
    "qk_norm_rope_bwd_kernel": Budget(channels, 20.5),
    "qk_dw_reduce": Budget(lambda args: args["ROWS"] * args["COLUMNS"], 8.0),
}
