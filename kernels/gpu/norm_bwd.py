"""RMSNorm and LayerNorm backward, with the residual's gradient added in the same pass.

    g_j = dy_j * (w_j or 1 + w_j),  xhat = (h - mean) * rstd
    dx = rstd * (g - mean_j(g_j) - xhat * mean_j(g_j * xhat_j)) + dh      RMSNorm: without mean and mean_j(g_j)
    dw_j = sum_rows(dy_j * xhat_j),  db_j = sum_rows(dy_j)                only if asked for

Bytes per element: dy, h, dx once (and dh). Asked for dw or db, each program adds up its rows' share in fp32 and writes
it as one row of partial sums [programs, H], which ``norm_reduce`` adds up: two launches, no atomics, the same bits.
In rows of more than 10240 columns the sums do not fit in registers and stay in the program's row of partial sums.
Numerics: fp32, one rounding at the end; ``ROUND`` (mode "llama") rounds xhat in dw to h's dtype as forward did.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Budget
from .launch import launch, sm_count
from .norm import load, load_parts, rows_at, store, tile_rows, times_weight, vector, with_row_stride
from .norm_plan import plan

REDUCE_ROWS, REDUCE_COLS = 64, 32
MAX_REGISTERS = 168  # three programs of four warps a multiprocessor; LayerNorm of five parts spills at 128 on sm_100
MAX_REGISTERS_TRAINED = 255  # 256 threads; the sums of 40 elements are another 40 registers, with a bias 80


@triton.jit
def zeros(ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros([ROWS, PART], tl.float32),)
    return parts


@triton.jit
def store_sums(out, sums, H: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """The sums over a tile's rows, as this program's row of partial sums."""
    for i in tl.static_range(PARTS):
        cols = i * PART + tl.arange(0, PART)
        tl.store(out + tl.program_id(0).to(tl.int64) * H + cols, tl.sum(sums[i], axis=0), mask=cols < H)


@triton.jit(do_not_specialize=["M"])
def norm_backward(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean, rstd, dx, dw, db, M,
    H: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PLUS_ONE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    lane = tl.broadcast_to(tl.arange(0, PART)[None, :], [ROWS, PART])
    dw_sums = zeros(ROWS, PART, PARTS)
    db_sums = zeros(ROWS, PART, PARTS)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * ROWS
        row, source = tile_rows(first, M, ROWS)
        exists = row < M - first
        gradients = load_parts(rows_at(dy, dy_stride, first, source, H), lane, H, PART, PARTS)
        values = load_parts(rows_at(h, h_stride, first, source, H), lane, H, PART, PARTS)
        inverse = tl.load(rstd + first + source)
        average = 0.0
        if mean is not None:
            average = tl.load(mean + first + source)
        if (dw is not None or db is not None) and ROWS > 1:
            repeated = gradients
            gradients = ()
            for i in tl.static_range(PARTS):
                gradients += (tl.where(exists, repeated[i], 0.0),)
        xhats = ()
        scaled = ()
        dw_new = ()
        db_new = ()
        products = tl.zeros([ROWS, PART], tl.float32)
        totals = tl.zeros([ROWS, PART], tl.float32)
        for i in tl.static_range(PARTS):
            xhat = (values[i] - average) * inverse
            gradient = gradients[i]
            rounded = xhat.to(h.dtype.element_ty).to(tl.float32) if ROUND else xhat
            dw_new += (dw_sums[i] + gradient * rounded,)
            db_new += (db_sums[i] + gradient,)
            if weight is not None:
                gradient = times_weight(gradient, weight, i * PART + lane, H, (i + 1) * PART > H, PLUS_ONE)
            products += gradient * xhat
            totals += gradient
            xhats += (xhat,)
            scaled += (gradient,)
        dw_sums = dw_new
        db_sums = db_new
        slope = tl.sum(products, axis=1, keep_dims=True) * (1.0 / H)
        shift = 0.0
        if mean is not None:
            shift = tl.sum(totals, axis=1, keep_dims=True) * (1.0 / H)
        for i in tl.static_range(PARTS):
            cols = i * PART + lane
            result = (scaled[i] - xhats[i] * slope - shift) * inverse
            if dh is not None:
                result += load(rows_at(dh, dh_stride, first, source, H), cols, H, (i + 1) * PART > H)
            store(dx + first * H + row * H, cols, result, exists, H, (i + 1) * PART > H)
    if dw is not None:
        store_sums(dw, dw_sums, H, PART, PARTS)
    if db is not None:
        store_sums(db, db_sums, H, PART, PARTS)


@triton.jit
def add_to_partial(partial, value, first, inside):
    """Add to this program's partial sums in memory; the reductions between two calls are its barriers."""
    tl.store(partial, value + tl.load(partial, mask=inside & (first == 0), other=0.0), mask=inside)


@triton.jit(do_not_specialize=["M"])
def norm_backward_wide(
    dy, dy_stride, dh, dh_stride, h, h_stride, weight, mean, rstd, dx, dw, db, M,
    H: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PLUS_ONE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = PARTS * PART != H
    program = tl.program_id(0)
    partial = program.to(tl.int64) * H
    for index in range(program, M, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        inverse = tl.load(rstd + row)
        average = 0.0
        if mean is not None:
            average = tl.load(mean + row)
        products = tl.zeros([PART], tl.float32)
        totals = tl.zeros([PART], tl.float32)
        for i in range(PARTS):
            cols = i * PART + tl.arange(0, PART)
            gradient = load(rows_at(dy, dy_stride, row, 0, H), cols, H, PADDED)
            xhat = (load(rows_at(h, h_stride, row, 0, H), cols, H, PADDED) - average) * inverse
            if weight is not None:
                gradient = times_weight(gradient, weight, cols, H, PADDED, PLUS_ONE)
            products += gradient * xhat
            totals += gradient
        slope = tl.sum(products) * (1.0 / H)
        shift = 0.0
        if mean is not None:
            shift = tl.sum(totals) * (1.0 / H)
        for i in range(PARTS):
            cols = i * PART + tl.arange(0, PART)
            gradient = load(rows_at(dy, dy_stride, row, 0, H), cols, H, PADDED)
            xhat = (load(rows_at(h, h_stride, row, 0, H), cols, H, PADDED) - average) * inverse
            if db is not None:
                add_to_partial(db + partial + cols, gradient, index == program, cols < H)
            if dw is not None:
                rounded = xhat.to(h.dtype.element_ty).to(tl.float32) if ROUND else xhat
                add_to_partial(dw + partial + cols, gradient * rounded, index == program, cols < H)
            if weight is not None:
                gradient = times_weight(gradient, weight, cols, H, PADDED, PLUS_ONE)
            result = (gradient - xhat * slope - shift) * inverse
            if dh is not None:
                result += load(rows_at(dh, dh_stride, row, 0, H), cols, H, PADDED)
            tl.store(dx + row * H + cols, result.to(dx.dtype.element_ty), mask=cols < H)


@triton.jit
def sum_rows(partials, out, P, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, P, ROWS):
        inside = (start + rows < P) & (cols < H)[None, :]
        total += tl.load(partials + tl.cast(start + rows, tl.int64) * H + cols[None, :], mask=inside, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=cols < H)


@triton.jit(do_not_specialize=["P"])
def norm_reduce(dw_partials, dw, db_partials, db, P, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    if dw is not None:
        sum_rows(dw_partials, dw, P, H, ROWS, COLS)
    if db is not None:
        sum_rows(db_partials, db, P, H, ROWS, COLS)


def _backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor,
    dw: Tensor | None, db: Tensor | None, plus_one: bool, round_first: bool,
) -> Tensor:  # fmt: skip
    """dx; dw and db are filled where given."""
    rows, cols = rstd.numel(), h.shape[-1]
    trained = dw is not None or db is not None
    tiling = plan(rows, cols, sm_count(h.device) if trained else None)
    registers = MAX_REGISTERS_TRAINED if trained else MAX_REGISTERS
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dw_partials, db_partials = (
        None if out is None else torch.empty(tiling.programs, cols, dtype=torch.float32, device=h.device)
        for out in (dw, db)
    )
    dy, dy_stride = with_row_stride(dy)
    h, h_stride = with_row_stride(h)
    dh, dh_stride = (None, None) if dh is None else with_row_stride(dh)
    statistics = (None if mean is None else mean.contiguous(), rstd.contiguous())
    launch(
        norm_backward_wide if tiling.wide else norm_backward,
        (tiling.programs,),
        *(dy, dy_stride, dh, dh_stride, h, h_stride, vector(weight), *statistics, dx, dw_partials, db_partials, rows),
        options={"num_warps": tiling.warps, "maxnreg": min(registers, 65536 // (32 * tiling.warps))},
        H=cols,
        PART=tiling.part,
        PARTS=tiling.parts,
        PLUS_ONE=plus_one,
        ROUND=round_first,
        **({} if tiling.wide else {"ROWS": tiling.rows}),
    )
    if trained:
        launch(
            norm_reduce,
            (triton.cdiv(cols, REDUCE_COLS),),
            *(dw_partials, dw, db_partials, db, tiling.programs),
            options={"num_warps": 4},
            H=cols,
            ROWS=REDUCE_ROWS,
            COLS=REDUCE_COLS,
        )
    return dx


def rms_norm_bwd(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor, mode: str, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(weight) if need_dw and weight is not None else None
    dx = _backward(dy, dh, h, weight, None, rstd, dw, None, mode == "gemma", mode == "llama")
    return dx, h.new_empty(0) if dw is None else dw


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dw, db = (torch.empty(x.shape[-1], dtype=torch.float32, device=x.device) if n else None for n in (need_dw, need_db))
    dx = _backward(dy, None, x, weight, mean, rstd, dw, db, False, False)
    return dx, *(rstd.new_empty(0) if gradient is None else gradient for gradient in (dw, db))


def _tile_and_sums(args: dict[str, Any]) -> int:
    """A tile, and once more for each set of sums that is reduced over its rows and written after the last tile."""
    return args["ROWS"] * args["PART"] * args["PARTS"] * (1 + sum(args[sums] is not None for sums in ("dw", "db")))


def _summed(args: dict[str, Any]) -> int:
    return args["ROWS"] * args["COLS"] * sum(args[out] is not None for out in ("dw", "db"))


# Instructions per element on sm_90 in bf16, counted by hand. Frozen weight: dy, h, w, dx in vectors of 8: 4/8; convert
# three 4.5, xhat, g, the sum of products, two for dx 5, convert dx 1/2: 10.5; fixed 80 per thread of 24 to 48 elements:
# 2.5; dh 2.6; LayerNorm 3 and 25 more for its reduction. Sum <= 19, and 10 % to spare. The sums of a trained weight and
# bias add 1 each (llama 3) and a pass over the tile after the last one, which counts as elements of its own.
# Wide rows have no budget: their loops over parts are partly unrolled.
# The reduction: load 1/4, add 1, fixed 130 per thread of 16 elements.
BUDGETS = {
    "norm_backward": Budget(_tile_and_sums, 21.0),
    "norm_reduce": Budget(_summed, 10.0),
}
