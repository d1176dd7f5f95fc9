"""RoPE of q and k in one launch, for any strides. Formulas, shapes and the adjoint: ``kernels/rope.py``.

A program holds ``TOKENS`` neighbouring tokens of one sequence and goes over ``GROUP`` heads of q or of k: cos and sin
of its tokens are read once into registers and serve all those heads. A head is handled as its two pair halves a and b
[TOKENS, BLOCK], BLOCK the power of two that holds R / 2: half-split, they are two contiguous pieces of the head;
interleaved, they are one piece that is split in registers. The backward is the same kernel with ``ADJOINT``.

Bytes: q and k are read and written once. The tables are read once per head group, from L2 but for the first time:
16 tokens x 128 channels x 2 tables against 16 x 128 x 8 heads read and written, an eighth.
Numerics: fp32 inside, one rounding. int64 offsets from the first product with a stride.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rope import head_tiles, power_of_two
from .aot import Budget
from .launch import launch, sm_count

WARPS = 4


@triton.jit
def place(length, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr):
    """(q or not, batch, positions [TOKENS, 1], token block over all sequences, first head, group of q's or k's)."""
    groups_q: tl.constexpr = (HEADS_Q + GROUP - 1) // GROUP
    groups: tl.constexpr = groups_q + (HEADS_K + GROUP - 1) // GROUP
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups
    per_sequence = (length + TOKENS - 1) // TOKENS
    position = (block % per_sequence) * TOKENS + tl.arange(0, TOKENS)[:, None]
    is_q = group < groups_q
    group = tl.where(is_q, group, group - groups_q)
    return is_q, (block // per_sequence).to(tl.int64), position.to(tl.int64), block, group * GROUP, group


@triton.jit
def load_pairs(rows, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second channel of every pair, fp32 [TOKENS, BLOCK], at the row pointers [TOKENS, 1]."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(rows + column, mask=mask & (column < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        inside = mask & (column < HALF)
        a = tl.load(rows + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(rows + HALF + column, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(rows, a, b, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Write what ``load_pairs`` reads."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK))
        tl.store(rows + column, x.to(rows.dtype.element_ty), mask=mask & (column < 2 * HALF))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        inside = mask & (column < HALF)
        tl.store(rows + column, a.to(rows.dtype.element_ty), mask=inside)
        tl.store(rows + HALF + column, b.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def rotate(a, b, cos_a, cos_b, sin_a, sin_b, ADJOINT: tl.constexpr):
    if ADJOINT:
        return a * cos_a + b * sin_b, b * cos_b - a * sin_a
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def strided_rows(is_q, q, k, batch, position, q_batch, q_token, q_head, k_batch, k_token, k_head):
    """(pointers to q's or k's tokens [TOKENS, 1], elements from head to head)."""
    from_q, from_k = batch * q_batch + position * q_token, batch * k_batch + position * k_token
    rows = tl.where(is_q, q, k) + tl.where(is_q, from_q, from_k)
    return rows, tl.where(is_q, q_head, k_head).to(tl.int64)


@triton.jit
def load_tables(
    cos, sin, batch, position, mask, table_batch, table_token,
    HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    table = batch * table_batch + position * table_token
    cos_a, cos_b = load_pairs(cos + table, mask, HALF, BLOCK, INTERLEAVED)
    sin_a, sin_b = load_pairs(sin + table, mask, HALF, BLOCK, INTERLEAVED)
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def rope_kernel(
    y_q, y_k, q, k, cos, sin,
    q_batch, q_token, q_head, k_batch, k_token, k_head, table_batch, table_token, length,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    is_q, batch, position, _, first, _ = place(length, HEADS_Q, HEADS_K, GROUP, TOKENS)
    inside = position < length
    heads = tl.where(is_q, HEADS_Q, HEADS_K)
    x, head_stride = strided_rows(is_q, q, k, batch, position, q_batch, q_token, q_head, k_batch, k_token, k_head)
    y = tl.where(is_q, y_q, y_k) + (batch * length + position) * heads * WIDTH
    if REST:  # before the tables fill the registers
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        for i in tl.static_range(GROUP):
            mask = inside & (first + i < heads) & (column < WIDTH)
            passed = tl.load(x + (first + i) * head_stride + column, mask=mask)
            tl.store(y + (first + i) * WIDTH + column, passed, mask=mask)

    cos_a, cos_b, sin_a, sin_b = load_tables(
        cos, sin, batch, position, inside, table_batch, table_token, HALF, BLOCK, INTERLEAVED
    )
    for i in tl.static_range(GROUP):
        mask = inside & (first + i < heads)
        a, b = load_pairs(x + (first + i) * head_stride, mask, HALF, BLOCK, INTERLEAVED)
        a, b = rotate(a, b, cos_a, cos_b, sin_a, sin_b, ADJOINT)
        store_pairs(y + (first + i) * WIDTH, a, b, mask, HALF, BLOCK, INTERLEAVED)


def strided(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(cos, sin, their batch and token strides); copied only if they do not share their strides."""
    if cos.stride(-1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))


def geometry(q: Tensor, k: Tensor, rotary: int, held: int) -> tuple[int, dict[str, int]]:
    """(number of programs, the constants that every kernel over heads of q and k shares); see ``head_tiles``."""
    tokens, group, programs = head_tiles(q, k, rotary, held)
    while group > 1 and programs < 2 * sm_count(q.device):  # a short batch: rather fill the device
        tokens, group, programs = head_tiles(q, k, rotary, held, group // 2)
    width = q.shape[-1]
    constants = {
        "HEADS_Q": q.shape[2],
        "HEADS_K": k.shape[2],
        "WIDTH": width,
        "HALF": rotary // 2,
        "GROUP": group,
        "TOKENS": tokens,
        "BLOCK": power_of_two(rotary // 2),
        "REST": power_of_two(width - rotary) if rotary < width else 0,
    }
    return programs, constants


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, adjoint: bool) -> tuple[Tensor, Tensor]:
    q, k = strided(q), strided(k)
    cos, sin, table_strides = tables(cos, sin)
    y_q, y_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    programs, constants = geometry(q, k, cos.shape[-1], cos.shape[-1])
    launch(
        rope_kernel,
        (programs,),
        *(y_q, y_k, q, k, cos, sin),
        *(*q.stride()[:3], *k.stride()[:3], *table_strides, q.shape[1]),
        options={"num_warps": WARPS},
        INTERLEAVED=interleaved,
        ADJOINT=adjoint,
        **constants,
    )
    return y_q, y_k


def channels(args: dict) -> int:
    """Channels that one program's straight-line code covers, the padding to powers of two included."""
    return args["TOKENS"] * args["GROUP"] * (2 * args["BLOCK"] + args["REST"])


# A thread's share of a head is 8 pairs. Per pair: 2 conversions to fp32, 4 multiply-adds, 1 packing conversion: 3.5 per
# channel. Per head: 4 accesses, about 6 for addresses and masks: 0.6. Tables: 32 conversions, 4 accesses, 50 for the
# program's place: 0.7 over 8 heads, 1.4 over 4. Counted 4.8 and 5.5, compiled 6.3 and 7.1: every other bf16 conversion
# takes two instructions, masked loads clear their registers first, 64-bit addresses take 12 instructions a head.
BUDGETS = {"rope_kernel": Budget(channels, 7.5)}
