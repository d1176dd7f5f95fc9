"""Triton kernels for dS and dB of LoRA adapters: one pass over every dY of the projections that share an input.

    dS_j = dY_i (c_j B_j)       [M, r_j]
    dB_j = c_j dY_i^T S_j       [N_i, r_j]        adapter j on projection i

dS sums over the columns of dY and dB over its rows, so whoever reads dY once leaves partial sums of one of them or of
both. A program owns SLICE columns of one dY and one of SPLITS parts of the rows, and walks over the rows in tiles of
BLOCK_M: a tile's product with c B is its share of dS, written at once; its product with S is added to the slice's dB,
which stays in registers. A second launch adds the shares of the N_i / SLICE slices to dS and of the SPLITS parts to dB,
in order.

Owning rows instead (dS in registers, dB written tile by tile) leaves the same bytes: with rank r, programs that cover
R rows and C columns leave 8 r (1 / C + 1 / R) M N bytes of partial sums, written and read, next to the 2 M N of dY,
whichever stays in registers; registers limit C here (SLICE) and would limit R there. C = R = 512 and r = 16 give 25 %
of dY; reading dY twice gives 100 %. Slices of columns win because their tiles are long rows, 1 KB each, where tiles of
512 rows would be 64 to 128 bytes wide. With r = 64 registers allow C = 256, and partial sums cost as much as the second
pass: above r = 32 torch.mm does as well. lora_plan.py chooses SLICE and SPLITS.

Bytes: every dY, B, S once, dS and dB once, the partial sums twice. B enters scaled in fp32 and rounded once, or split
in hi + lo (lora.py). Numerics: fp32 accumulation, one rounding of dS and dB. No atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora_plan
from .aot import Budget
from .launch import capability, launch
from .lora_skinny import shared_bytes, slots, unit_rows

PROJECTIONS = 4  # pointers of one launch


@triton.jit
def choose(i, values, COUNT: tl.constexpr):
    """values[i] of COUNT scalars or pointers."""
    result = values[0]
    for j in tl.static_range(1, COUNT):
        result = tl.where(i == j, values[j], result)
    return result


@triton.jit
def span(i, FIRST: tl.constexpr, OWN: tl.constexpr):
    """(first column in S, end) of projection i, whose adapters are OWN[i] .. OWN[i + 1]."""
    begin, end = tl.full((), FIRST[OWN[0]], tl.int32), tl.full((), FIRST[OWN[1]], tl.int32)
    for j in tl.static_range(1, len(OWN) - 1):
        begin, end = tl.where(i == j, FIRST[OWN[j]], begin), tl.where(i == j, FIRST[OWN[j + 1]], end)
    return begin, end


@triton.jit
def column_pointers(c, pointers, scalings, FIRST: tl.constexpr):
    """(address of row 0, row length, scaling) of the columns c of stacked row-major matrices [N, r_j]."""
    address, width = pointers[0] + c, tl.full(c.shape, FIRST[1], tl.int64)
    scaling = tl.zeros(c.shape, tl.float32) + scalings[0]
    for j in tl.static_range(1, len(FIRST) - 1):
        address = tl.where(c >= FIRST[j], pointers[j] + (c - FIRST[j]), address)
        width = tl.where(c >= FIRST[j], FIRST[j + 1] - FIRST[j], width)
        scaling = tl.where(c >= FIRST[j], scalings[j], scaling)
    return address, width, scaling


@triton.jit
def owner(tile, ns, COUNT: tl.constexpr, SLICE: tl.constexpr):
    """(projection, slice of it) of a tile: slices of all projections are numbered through."""
    i, begin, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for j in tl.static_range(COUNT - 1):
        end += tl.cdiv(ns[j], SLICE)
        behind = tile >= end
        i += behind.to(tl.int32)
        begin = tl.where(behind, end, begin)
    return i, tile - begin


@triton.jit
def bases(i, ns, M, FIRST: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr, SLICE: tl.constexpr):
    """Where projection i's partial sums of dS and dB begin."""
    ds, db = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for j in tl.static_range(len(OWN) - 2):
        rank = FIRST[OWN[j + 1]] - FIRST[OWN[j]]
        ds += tl.where(i > j, tl.cast(M, tl.int64) * tl.cdiv(ns[j], SLICE) * rank, 0)
        db += tl.where(i > j, tl.cast(ns[j], tl.int64) * SPLITS * rank, 0)
    return ds, db


@triton.jit
def scaled_slice(c, inside, start, left, pointers, scalings, FIRST: tl.constexpr, SLICE: tl.constexpr):
    """fp32 c B of the columns c, rows start .. start + SLICE, of which ``left`` exist."""
    address, width, scaling = column_pointers(c, pointers, scalings, FIRST)
    rows = tl.arange(0, SLICE)  # 32-bit offsets from the slice's first row: half the registers of addresses
    wide = tl.load(
        (address + start * width)[None, :] + rows[:, None] * width.to(tl.int32)[None, :],
        mask=(rows[:, None] < left) & inside[None, :],
        other=0.0,
    )
    return wide.to(tl.float32) * scaling[None, :]


@triton.jit
def grad_s_b_kernel(
    dy0, dy1, dy2, dy3, s, ds_parts, db_parts, b0, b1, b2, b3, b4, b5, b6, b7, c0, c1, c2, c3, c4, c5, c6, c7,
    M, n0, n1, n2, n3, stride0, stride1, stride2, stride3, stride_s,
    FIRST: tl.constexpr, OWN: tl.constexpr, SPLIT: tl.constexpr, NEED_B: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, RANK_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, SLICE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One slice of one dY and one part of its rows; RANK_LAST: in which order dB [SLICE, r] is multiplied."""
    COUNT: tl.constexpr = len(OWN) - 1
    part, ns = tl.program_id(1), (n0, n1, n2, n3)
    i, tile = owner(tl.program_id(0), ns, COUNT, SLICE)
    ds_base, db_base = bases(i, ns, M, FIRST, OWN, SPLITS, SLICE)
    N = tl.cast(choose(i, ns, COUNT), tl.int64)
    stride = tl.cast(choose(i, (stride0, stride1, stride2, stride3), COUNT), tl.int64)
    if ALIGNED:
        stride, N = stride // 8 * 8, N // 8 * 8
    begin, stop = span(i, FIRST, OWN)
    rank = (stop - begin).to(tl.int64)
    n = tile.to(tl.int64) * SLICE + tl.arange(0, SLICE)
    c = begin + tl.arange(0, BLOCK_R).to(tl.int64)
    inside = c < stop
    dy = choose(i, (dy0, dy1, dy2, dy3), COUNT) + n[None, :]
    pointers, scalings = (b0, b1, b2, b3, b4, b5, b6, b7), (c0, c1, c2, c3, c4, c5, c6, c7)
    start = tile.to(tl.int64) * SLICE
    wide = scaled_slice(c, inside, start, N - start, pointers, scalings, FIRST, SLICE)
    high = wide.to(s.dtype.element_ty)
    low = (wide - high.to(tl.float32)).to(s.dtype.element_ty)
    rows_each = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    if RANK_LAST:
        db = tl.zeros((SLICE, BLOCK_R), tl.float32)
    else:
        db = tl.zeros((BLOCK_R, SLICE), tl.float32)
    for m0 in range(part * rows_each, tl.minimum((part + 1) * rows_each, M), BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        present, far = rows < M, rows.to(tl.int64)
        if EVEN:
            left = tl.load(dy + far[:, None] * stride, mask=present[:, None], other=0.0)
        else:
            left = tl.load(dy + far[:, None] * stride, mask=present[:, None] & (n[None, :] < N), other=0.0)
        ds = tl.dot(left, high, input_precision="ieee")
        if SPLIT:
            ds = tl.dot(left, low, ds, input_precision="ieee")
        out = ds_parts + ds_base + (tile.to(tl.int64) * M + far)[:, None] * rank + (c - begin)[None, :]
        tl.store(out, ds, mask=present[:, None] & inside[None, :])
        if NEED_B:
            if RANK_LAST:
                right = tl.load(
                    s + far[:, None] * stride_s + c[None, :], mask=present[:, None] & inside[None, :], other=0.0
                )
                db = tl.dot(tl.trans(left), right, db, input_precision="ieee")
            else:
                right = tl.load(
                    s + far[None, :] * stride_s + c[:, None], mask=present[None, :] & inside[:, None], other=0.0
                )
                db = tl.dot(right, left, db, input_precision="ieee")
    if NEED_B:
        if not RANK_LAST:
            db = tl.trans(db)
        out = db_parts + db_base + (part.to(tl.int64) * N + n)[:, None] * rank + (c - begin)[None, :]
        tl.store(out, db, mask=(n[:, None] < N) & inside[None, :])


@triton.jit
def grad_s_b_sum_kernel(
    ds_parts, db_parts, ds, db0, db1, db2, db3, db4, db5, db6, db7, c0, c1, c2, c3, c4, c5, c6, c7, M, n0, n1, n2, n3,
    FIRST: tl.constexpr, OWN: tl.constexpr, NEED: tl.constexpr, SPLITS: tl.constexpr, SLICE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one projection's dS (programs 0 ..) or dB (behind them): sums of partial sums, in order."""
    COUNT: tl.constexpr = len(OWN) - 1
    RANK: tl.constexpr = FIRST[len(FIRST) - 1]
    i, block = tl.program_id(1), tl.program_id(0).to(tl.int64)
    ns = (n0, n1, n2, n3)
    ds_base, db_base = bases(i, ns, M, FIRST, OWN, SPLITS, SLICE)
    N = tl.cast(choose(i, ns, COUNT), tl.int64)
    begin, stop = span(i, FIRST, OWN)
    rank = (stop - begin).to(tl.int64)
    c = begin + tl.arange(0, BLOCK_R).to(tl.int64)
    inside = c < stop
    acc = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    blocks = tl.cdiv(M, BLOCK)
    if block < blocks:
        rows = block * BLOCK + tl.arange(0, BLOCK)
        keep = (rows[:, None] < M) & inside[None, :]
        parts = ds_parts + ds_base + rows[:, None] * rank + (c - begin)[None, :]
        for p in range(0, tl.cdiv(N, SLICE).to(tl.int32)):
            acc += tl.load(parts + p * (tl.cast(M, tl.int64) * rank), mask=keep, other=0.0)
        tl.store(ds + rows[:, None] * RANK + c[None, :], acc.to(ds.dtype.element_ty), mask=keep)
    else:
        rows = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        keep = (rows[:, None] < N) & inside[None, :]
        parts = db_parts + db_base + rows[:, None] * rank + (c - begin)[None, :]
        for p in tl.static_range(SPLITS):
            acc += tl.load(parts + p * (N * rank), mask=keep, other=0.0)
        address, width, scaling = column_pointers(
            c, (db0, db1, db2, db3, db4, db5, db6, db7), (c0, c1, c2, c3, c4, c5, c6, c7), FIRST
        )
        wanted = tl.full(c.shape, NEED[0], tl.int1)
        for j in tl.static_range(1, len(NEED)):
            wanted = tl.where(c >= FIRST[j], tl.full(c.shape, NEED[j], tl.int1), wanted)
        out = address[None, :] + rows[:, None] * width[None, :]
        tl.store(out, (acc * scaling[None, :]).to(db0.dtype.element_ty), mask=keep & wanted[None, :])


def grad_s_b(
    dys: Sequence[Tensor],
    s: Tensor,
    b: Sequence[Tensor],
    scalings: Sequence[float],
    owners: Sequence[int],
    splits: Sequence[bool],
    need_db: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """``lora_grad_s_b``."""
    ds = torch.empty(s.shape, dtype=dys[0].dtype, device=s.device)
    dbs = [
        torch.empty(t.shape if need else 0, dtype=t.dtype, device=t.device) for t, need in zip(b, need_db, strict=True)
    ]
    dys, b, s = [unit_rows(dy) for dy in dys], [t.contiguous() for t in b], unit_rows(s)
    m, size, device = s.shape[0], s.element_size(), s.device
    tensor_memory = capability(device) in (90, 100)
    used, own, first, ranks, cut, (ds_bytes, db_bytes), aligned = lora_plan.grad_s_b(dys, b, owners, splits)
    dys = [dys[i] for i in used]
    widths, block_r = [t.shape[1] for t in dys], lora_plan.padded(max(ranks))
    ds_parts = torch.empty(ds_bytes // 4, dtype=torch.float32, device=device)
    db_parts = torch.empty(db_bytes // 4, dtype=torch.float32, device=device) if any(need_db) else None
    block_m = 16 if size == 4 else 64 if tensor_memory else 32
    stage = block_m * (cut.block + block_r) * size
    fixed = cut.block * block_r * size * (2 if splits[0] else 1)
    fits = (shared_bytes(device) - fixed) // stage + (0 if tensor_memory else 1)
    shape = {"FIRST": first, "OWN": own, "SPLITS": cut.splits, "SLICE": cut.block, "BLOCK_R": block_r}
    numbers = (*slots([float(c) for c in scalings]), m, *_four(widths))
    launch(
        grad_s_b_kernel,
        (sum(lora_plan.ceil_div(n, cut.block) for n in widths), cut.splits),
        *(*_four(dys), s, ds_parts, db_parts, *slots(b), *numbers, *_four([t.stride(0) for t in dys]), s.stride(0)),
        options={"num_warps": 8 if cut.block * block_r >= 4096 else 4, "num_stages": max(2, min(4, fits))},
        SPLIT=splits[0],
        NEED_B=any(need_db),
        EVEN=all(n % cut.block == 0 for n in widths),
        ALIGNED=aligned,
        RANK_LAST=tensor_memory,
        BLOCK_M=block_m,
        **shape,
    )
    block = 2048 // block_r
    placeholder = next((t for t, need in zip(dbs, need_db, strict=True) if need), None)
    outs = [t if need else placeholder for t, need in zip(dbs, need_db, strict=True)]
    blocks = lora_plan.ceil_div(m, block) + (lora_plan.ceil_div(max(widths), block) if any(need_db) else 0)
    launch(
        grad_s_b_sum_kernel,
        (blocks, len(used)),
        *(ds_parts, db_parts, ds, *slots(outs), *numbers),
        options={"num_warps": 4},
        NEED=tuple(need_db),
        BLOCK=block,
        **shape,
    )
    return ds, dbs


def _four(items: Sequence) -> list:
    """Four arguments, None behind the last."""
    return [*items, *[None] * (PROJECTIONS - len(items))]


# grad_s_b_sum_kernel, per partial sum read (SPLITS of dB and one step of the loop over dS's): a thread's 16 elements
# take 4 loads of 16 bytes, 16 additions, 10 of addresses: 2; at the end twice 16 multiplications or roundings, 8 stores
# with 60 of addresses and masks, and 150 of scalars, pointers and scalings: 330 / 16 shared by SPLITS + 1, 7 for two
# splits; the compiler unrolls the loop by four: 2. Sum 11; 13 in narrow accesses of odd ranks.
BUDGETS: dict[str, Budget] = {
    "grad_s_b_sum_kernel": Budget(lambda args: args["BLOCK"] * args["BLOCK_R"] * (args["SPLITS"] + 1), 14),
}
