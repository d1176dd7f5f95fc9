"""Triton kernels of glu_lora.py: the GLU's backward whose tiles also enter dA_down, dB_gate and dB_up.

A program owns COLS columns of I and one of SPLITS parts of the rows, and walks over the rows in tiles BLOCK_M x COLS.
It loads dh, gate and up, writes dgate and dup, and adds three products [COLS, BLOCK_M] x [BLOCK_M, r] to accumulators
in registers. The factors, r columns, come from the L2 cache. A second launch adds the SPLITS parts in order, scales
and rounds. Bytes and numerics as in glu_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..glu_lora import splits
from .aot import Budget
from .glu import activate, strided
from .launch import launch

COLS, BLOCK_M, WARPS, REDUCED = 128, 16, 8, 1024  # 12 KB a tile, two programs per multiprocessor


@triton.jit
def _add_product(total, value, ptr, stride, rows, inside, R: tl.constexpr, RANK: tl.constexpr):
    """total [COLS, RANK] + value^T [COLS, BLOCK_M] x a factor's rows [BLOCK_M, R], zero beyond its rank and rows."""
    ranks = tl.arange(0, RANK)[None, :]
    factor = tl.load(ptr + rows * stride + ranks, mask=inside & (ranks < R), other=0.0)
    return tl.dot(tl.trans(value), factor, total, input_precision="ieee")


@triton.jit
def _keep(ptr, total, cols, width, split, R: tl.constexpr, RANK: tl.constexpr, ROWS_OF_RANK: tl.constexpr):
    """Write a slice's partial sum [COLS, R] of part ``split`` into [SPLITS, width, R], or [SPLITS, R, width]."""
    ranks = tl.arange(0, RANK)
    inside = (cols < width)[:, None] & (ranks < R)[None, :]
    base = ptr + split * width * R
    if ROWS_OF_RANK:
        tl.store(base + ranks[None, :] * width + cols[:, None], total, mask=inside)
    else:
        tl.store(base + cols[:, None] * R + ranks[None, :], total, mask=inside)


@triton.jit
def _glu_bwd_lora(
    dgate_ptr,
    dup_ptr,
    part_a_ptr,
    part_gate_ptr,
    part_up_ptr,
    dh_ptr,
    gate_ptr,
    up_ptr,
    ds_ptr,
    s_gate_ptr,
    s_up_ptr,
    M,
    width,
    dh_stride,
    gate_stride,
    up_stride,
    ds_stride,
    s_gate_stride,
    s_up_stride,
    part,
    ACT: tl.constexpr,
    R_A: tl.constexpr,
    R_GATE: tl.constexpr,
    R_UP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLS: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    begin = split * part
    end = tl.minimum(begin + part, M)
    kind: tl.constexpr = dgate_ptr.dtype.element_ty
    da = tl.zeros((COLS, RANK), tl.float32)
    dgate_sum = tl.zeros((COLS, RANK), tl.float32)
    dup_sum = tl.zeros((COLS, RANK), tl.float32)
    for step in range(0, part, BLOCK_M):
        rows = (begin + step + tl.arange(0, BLOCK_M))[:, None]
        inside = rows < end
        mask = inside & (cols < width)[None, :]
        gate = tl.load(gate_ptr + rows * gate_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + rows * up_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + rows * dh_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        activated, slope = activate(gate, ACT)
        dgate, dup = (dh * up * slope).to(kind), (dh * activated).to(kind)
        tl.store(dgate_ptr + rows * width + cols[None, :], dgate, mask=mask)
        tl.store(dup_ptr + rows * width + cols[None, :], dup, mask=mask)
        if R_A:
            da = _add_product(da, (activated * up).to(kind), ds_ptr, ds_stride, rows, inside, R_A, RANK)
        if R_GATE:
            dgate_sum = _add_product(dgate_sum, dgate, s_gate_ptr, s_gate_stride, rows, inside, R_GATE, RANK)
        if R_UP:
            dup_sum = _add_product(dup_sum, dup, s_up_ptr, s_up_stride, rows, inside, R_UP, RANK)
    if R_A:
        _keep(part_a_ptr, da, cols, width, split, R_A, RANK, True)
    if R_GATE:
        _keep(part_gate_ptr, dgate_sum, cols, width, split, R_GATE, RANK, False)
    if R_UP:
        _keep(part_up_ptr, dup_sum, cols, width, split, R_UP, RANK, False)


@triton.jit
def _add(grad_ptr, part_ptr, n, scaling, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part_ptr + split * n + index, mask=inside, other=0.0)
    tl.store(grad_ptr + index, total * scaling, mask=inside)


@triton.jit
def _add_parts(
    da_ptr,
    dgate_ptr,
    dup_ptr,
    part_a_ptr,
    part_gate_ptr,
    part_up_ptr,
    n_a,
    n_gate,
    n_up,
    c_a,
    c_gate,
    c_up,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each gradient = its scaling * the sum of its SPLITS parts of n elements; program_id(1) says which."""
    which = tl.program_id(1)
    if part_a_ptr is not None:
        if which == 0:
            _add(da_ptr, part_a_ptr, n_a, c_a, SPLITS, BLOCK)
    if part_gate_ptr is not None:
        if which == 1:
            _add(dgate_ptr, part_gate_ptr, n_gate, c_gate, SPLITS, BLOCK)
    if part_up_ptr is not None:
        if which == 2:
            _add(dup_ptr, part_up_ptr, n_up, c_up, SPLITS, BLOCK)


def glu_bwd_lora(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    act: str,
    factors: Sequence[Tensor | None],
    adapters: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    dh, gate, up = strided(dh), strided(gate), strided(up)
    (m, width), parts = gate.shape, splits(*gate.shape)
    rows = [None if f is None else strided(f) for f in factors]
    ranks = [0 if f is None else f.shape[1] for f in rows]
    partial = [torch.empty(parts, width, r, dtype=torch.float32, device=gate.device) if r else None for r in ranks]
    strides = (t.stride(0) if t is not None else 0 for t in (dh, gate, up, *rows))
    part = triton.cdiv(triton.cdiv(m, parts), BLOCK_M) * BLOCK_M
    rank, wide = max(16, triton.next_power_of_2(max(ranks))), gate.element_size() == 4
    cols = COLS // 2 if wide and rank > 16 else COLS  # fp32 tiles of 128 columns at rank 32 spilled on sm_86 and 89
    stages = 2 if wide else 3  # within 99 KB of shared memory; four spilled under Triton 3.6 on sm_120
    constants = dict(zip(("R_A", "R_GATE", "R_UP"), ranks, strict=True), BLOCK_M=BLOCK_M, COLS=cols, RANK=rank)
    tensors, options = (
        (dgate, dup, *partial, dh, gate, up, *rows),
        dict(num_warps=WARPS, num_stages=stages),
    )
    grid = (triton.cdiv(width, cols), parts)
    launch(_glu_bwd_lora, grid, *tensors, m, width, *strides, part, options=options, ACT=act, **constants)
    grads = [
        None if f is None or a is None else torch.empty(a.shape, dtype=a.dtype, device=gate.device)
        for f, a in zip(rows, adapters, strict=True)
    ]
    sizes = [width * r for r in ranks]
    constants = dict(SPLITS=parts, BLOCK=REDUCED)
    numbers, options = (*sizes, *map(float, scalings)), dict(num_warps=4)
    launch(_add_parts, (triton.cdiv(max(sizes), REDUCED), 3), *grads, *partial, *numbers, options=options, **constants)
    return dgate, dup, [gate.new_empty(0) if grad is None else grad for grad in grads]


# Per element of each of three gradients: 8 parts' loads 2, additions and selects 16, address and store 4; times three,
# for the code holds three copies, of which a program runs one.
BUDGETS = {"_add_parts": Budget(lambda args: args["BLOCK"], 66)}
