"""Triton kernels of dora.py: row norms of W + s B A that exists only in registers, and the column scale.

    norm       a program sums (W + s B A)^2 over a tile of BLOCK_N rows and a span of K, tile by tile; the
               partial sums [splits, N] are added and rooted by a second kernel
    scale      y = u * scale + bias + base, a tile per program
    scale_bwd  du = dy * scale, and sum_m dy u over a span of rows per program; partial sums [splits, N], added by the
               same second kernel

Bytes: every [N, K] and [M, N] operand once; partial sums under 2 % of them. Numerics: fp32 inside. Products of
adapters are exact for 16-bit adapters; for fp32 ones three tf32 products each (22 bits) where there is tf32, else FMAs.
No atomics: spans are a function of the shapes and the device's multiprocessors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Budget
from .launch import capability, launch, sm_count

NORM_K = 64
RANK_MAX = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # per dot; three tf32 products keep six operands
SCALE_M, SCALE_N = 16, 256  # 32 elements per thread of four warps: four 16-byte loads in flight for 16-bit u
BWD_M, BWD_N = 32, 128
SPAN_MIN = 128  # rows per program in backward, so that partial sums stay small
REDUCE_S, REDUCE_N = 8, 128  # one warp: a row of 128 is a 16-byte load per thread, and rows add up within the thread
PROGRAMS_PER_SM = 4


@triton.jit
def _norm_kernel(
    partial, weight, a, b, scaling, n, k, rank, span, stride_w, stride_a, stride_b,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ONE_R: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    live = rows < n
    w_tile = weight + rows[:, None] * stride_w + columns[None, :]
    a_tile = a + ranks[:, None] * stride_a + columns[None, :]
    b_tile = b + rows[:, None] * stride_b + ranks[None, :]
    if ONE_R:
        low_b = tl.load(b_tile, mask=live[:, None] & (ranks < rank)[None, :], other=0.0).to(DOT)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(split * span, min(split * span + span, k), BLOCK_K):
        inside = columns < k - start
        w = tl.load(w_tile + start, mask=live[:, None] & inside[None, :], other=0.0)
        if ONE_R:
            low_a = tl.load(a_tile + start, mask=(ranks < rank)[:, None] & inside[None, :], other=0.0).to(DOT)
            delta = tl.dot(low_b, low_a, input_precision=PRECISION)
        else:
            delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for r in range(0, rank, BLOCK_R):
                here = ranks < rank - r
                part_b = tl.load(b_tile + r, mask=live[:, None] & here[None, :], other=0.0).to(DOT)
                part_a_tile = a + (ranks + r)[:, None] * stride_a + columns[None, :] + start
                part_a = tl.load(part_a_tile, mask=here[:, None] & inside[None, :], other=0.0).to(DOT)
                delta = tl.dot(part_b, part_a, delta, input_precision=PRECISION)
        adapted = w.to(tl.float32) + scaling * delta
        squares += adapted * adapted
    tl.store(partial + split * n + rows, tl.sum(squares, 1), mask=live)


@triton.jit
def _scale_kernel(
    y, u, scale, bias, base, m, n, stride_u, stride_base, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    mask = (rows < m)[:, None] & inside[None, :]
    factor = tl.load(scale + columns, mask=inside)
    value = tl.load(u + rows[:, None] * stride_u + columns[None, :], mask=mask).to(tl.float32) * factor[None, :]
    if bias is not None:
        value += tl.load(bias + columns, mask=inside).to(tl.float32)[None, :]
    if base is not None:
        value += tl.load(base + rows[:, None] * stride_base + columns[None, :], mask=mask).to(tl.float32)
    tl.store(y + rows[:, None] * n + columns[None, :], value, mask=mask)


@triton.jit
def _scale_bwd_kernel(
    du, partial, dy, u, scale, m, n, span, stride_dy, stride_u, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = columns < n
    factor = tl.load(scale + columns, mask=inside)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * span, min(split * span + span, m), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < m)[:, None] & inside[None, :]
        grad = tl.load(dy + rows[:, None] * stride_dy + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(u + rows[:, None] * stride_u + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(du + rows[:, None] * n + columns[None, :], grad * factor[None, :], mask=mask)
        sums += grad * value
    tl.store(partial + split * n + columns, tl.sum(sums, 0), mask=inside)


@triton.jit
def _sum_kernel(out, partial, splits, n, ROOT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n
    sums = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
    for start in range(0, splits, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        mask = (rows < splits)[:, None] & inside[None, :]
        sums += tl.load(partial + rows[:, None] * n + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    if ROOT:
        total = tl.sqrt_rn(total)
    tl.store(out + columns, total, mask=inside)


def _unit(x: Tensor) -> Tensor:
    """x with a last dimension of stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _spans(length: int, others: int, block: int, least: int, device: torch.device) -> tuple[int, int]:
    """(span, splits): cut ``length`` into spans, multiples of ``block`` and at least ``least``, so that with ``others``
    programs per span the device is filled."""
    wanted = max(1, PROGRAMS_PER_SM * sm_count(device) // max(1, others))
    span = max(least, triton.cdiv(triton.cdiv(length, wanted), block) * block)
    return span, max(1, triton.cdiv(length, span))


def _total(partial: Tensor, root: bool) -> Tensor:
    splits, n = partial.shape
    out = torch.empty(n, dtype=torch.float32, device=partial.device)
    blocks: dict[str, Any] = dict(ROOT=root, BLOCK_S=REDUCE_S, BLOCK_N=REDUCE_N)
    launch(_sum_kernel, (triton.cdiv(n, REDUCE_N),), out, partial, splits, n, options=dict(num_warps=1), **blocks)
    return out


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The op's launcher."""
    weight, a, b = _unit(weight), _unit(a), _unit(b)
    (n, k), rank = weight.shape, a.shape[0]
    tensor_cores = capability(weight.device) >= 80  # before that Triton multiplies with FMAs, which hold more registers
    block_n = 64 if tensor_cores else 32
    tiles = triton.cdiv(n, block_n)
    span, splits = _spans(k, tiles, NORM_K, 4 * NORM_K, weight.device)
    partial = torch.empty(splits, n, dtype=torch.float32, device=weight.device)
    low = a.dtype if a.dtype == b.dtype and tensor_cores else torch.float32
    block_r = min(RANK_MAX[low], max(16, triton.next_power_of_2(rank)))
    constants: dict[str, Any] = dict(
        BLOCK_N=block_n,
        BLOCK_K=NORM_K,
        BLOCK_R=block_r,
        ONE_R=rank <= block_r,
        DOT={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[low],
        PRECISION="tf32x3" if tensor_cores and low == torch.float32 else "ieee",
    )
    strides = (weight.stride(0), a.stride(0), b.stride(0))
    launch(
        _norm_kernel,
        (tiles, splits),
        *(partial, weight, a, b, scaling, n, k, rank, span, *strides),
        options=dict(num_warps=8, num_stages=2),
        **constants,
    )
    return _total(partial, root=True)


def dora_scale(u: Tensor, scale: Tensor, bias: Tensor | None, base: Tensor | None) -> Tensor:
    """The op's launcher."""
    u, scale = _unit(u), scale.contiguous()
    bias, base = None if bias is None else bias.contiguous(), None if base is None else _unit(base)
    m, n = u.shape
    y = torch.empty(m, n, dtype=u.dtype, device=u.device)
    block_n = min(SCALE_N, triton.next_power_of_2(max(16, n)))
    launch(
        _scale_kernel,
        (triton.cdiv(m, SCALE_M), triton.cdiv(n, block_n)),
        *(y, u, scale, bias, base, m, n, u.stride(0), 0 if base is None else base.stride(0)),
        options=dict(num_warps=4),
        BLOCK_M=SCALE_M,
        BLOCK_N=block_n,
    )
    return y


def dora_scale_bwd(dy: Tensor, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The op's launcher."""
    dy, u, scale = _unit(dy), _unit(u), scale.contiguous()
    m, n = dy.shape
    du = torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    tiles = triton.cdiv(n, BWD_N)
    span, splits = _spans(m, tiles, BWD_M, SPAN_MIN, dy.device)
    partial = torch.empty(splits, n, dtype=torch.float32, device=dy.device)
    launch(
        _scale_bwd_kernel,
        (tiles, splits),
        *(du, partial, dy, u, scale, m, n, span, dy.stride(0), u.stride(0)),
        options=dict(num_warps=4),
        BLOCK_M=BWD_M,
        BLOCK_N=BWD_N,
    )
    return du, _total(partial, root=False)


# Instructions per element on sm_90 in bf16, 32 elements per thread in four rows. scale: convert, multiply, half a
# packing conversion, 2/8 for the accesses: 2.75; per thread addresses and masks 60, the factor by shared memory 25, the
# program's place 30: 3.6. Sum 6.4; a base adds 2.7, a bias 0.6. scale_bwd: two conversions, multiply, multiply-add,
# half a conversion, 3/8: 4.9; per thread addresses and masks of three arrays 100, zeroing and adding up the sums 90,
# place and loop 60: 7.8. Sum 12.7, compiled 15.1: masked loads clear their registers first (1), and every other bf16
# conversion takes two instructions (1). sum, 32 elements per thread in eight rows: additions and cleared registers 3,
# loads 1/4; per thread addresses and masks 60, the program's place and loop 50, four roots 60: 5.3. Sum 8.6.
BUDGETS = {
    "_scale_kernel": Budget(lambda args: args["BLOCK_M"] * args["BLOCK_N"], 10.0),
    "_scale_bwd_kernel": Budget(lambda args: args["BLOCK_M"] * args["BLOCK_N"], 16.0),
    "_sum_kernel": Budget(lambda args: args["BLOCK_S"] * args["BLOCK_N"], 10.0),
}
