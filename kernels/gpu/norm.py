"""RMSNorm and LayerNorm forward, with the residual add in front, for ``kernels/rms_norm.py`` and ``layer_norm.py``.

    h = x + residual,  mean = mean_j(h_j),  rstd = 1 / sqrt(mean_j((h_j - mean)^2) + eps)
    y = rounding((h - mean) * rstd, weight) + bias

RMSNorm is LayerNorm with mean = 0: without a ``mean`` buffer nothing is centred.

Bytes per element: x and y once (also residual and h if there is one); the vectors and statistics are small. Rows wider
than 16384 are read twice, the second time mostly from cache. ``norm_plan.py`` explains the tiles.
Numerics: h is rounded to x's dtype before it is normalised, as the plain sum of two tensors is; all else in fp32 with
one rounding, but for ``ROUND``, which rounds xhat to x's dtype before the product with the weight (mode "llama").
The variance is that of the centred row; in wide rows blocks are combined in pairs (Chan, Golub and LeVeque 1979).
Rows past the last one repeat it in loads and are masked in stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Budget
from .launch import launch
from .norm_plan import plan

MAX_REGISTERS = (
    128  # none needs as many; without a bound ptxas 12.8 aims at 9 programs a multiprocessor and spills a word
)


@triton.jit
def rows_at(tensor, stride, first, source, H: tl.constexpr):
    """Pointers to rows first + source; without a stride the rows are contiguous, and aligned as far as H allows."""
    if stride is None:
        return tensor + first * H + source * H
    else:
        return tensor + first * stride + source * stride


@triton.jit
def load(pointers, cols, H: tl.constexpr, PADDED: tl.constexpr):
    """fp32 values at ``pointers + cols``, 0 beyond column H."""
    if PADDED:
        return tl.load(pointers + cols, mask=cols < H, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers + cols).to(tl.float32)


@triton.jit
def load_parts(pointers, lane, H: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """All parts of the rows at ``pointers``: loads first and uses later keep them all in flight."""
    parts = ()
    for i in tl.static_range(PARTS):
        parts += (load(pointers, i * PART + lane, H, (i + 1) * PART > H),)
    return parts


@triton.jit
def store(pointers, cols, value, exists, H: tl.constexpr, PADDED: tl.constexpr):
    if PADDED:
        exists = exists & (cols < H)
    tl.store(pointers + cols, value.to(pointers.dtype.scalar.element_ty), mask=exists)


@triton.jit
def times_weight(value, weight, cols, H: tl.constexpr, PADDED: tl.constexpr, PLUS_ONE: tl.constexpr):
    """value * w or value * (1 + w)."""
    product = value * load(weight, cols, H, PADDED)
    if PLUS_ONE:
        product += value
    return product


@triton.jit
def scale_and_shift(
    xhat, weight, bias, cols, dtype: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, PLUS_ONE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    if ROUND:
        xhat = xhat.to(dtype).to(tl.float32)
    if weight is not None:
        xhat = times_weight(xhat, weight, cols, H, PADDED, PLUS_ONE)
    if bias is not None:
        xhat += load(bias, cols, H, PADDED)
    return xhat


@triton.jit
def tile_rows(first, M, ROWS: tl.constexpr):
    """The rows of a tile that starts at row ``first``, counted from there, as [ROWS, 1]: those to store to, and those
    to load from, where the last row stands for all beyond it, in 64 bits to multiply strides."""
    row = tl.arange(0, ROWS)[:, None]
    source = row.to(tl.int64)
    if ROWS > 1:
        source = tl.minimum(row, (tl.minimum(M - first, ROWS) - 1).to(tl.int32)).to(tl.int64)
    return row, source


@triton.jit(do_not_specialize=["M"])
def norm_forward(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean, rstd, M, eps,
    H: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PLUS_ONE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, source = tile_rows(first, M, ROWS)
    exists = row < M - first
    lane = tl.broadcast_to(tl.arange(0, PART)[None, :], [ROWS, PART])

    values = load_parts(rows_at(x, x_stride, first, source, H), lane, H, PART, PARTS)
    if residual is not None:
        added = load_parts(rows_at(residual, residual_stride, first, source, H), lane, H, PART, PARTS)
        sums = ()
        for i in tl.static_range(PARTS):
            sums += ((values[i] + added[i]).to(dtype).to(tl.float32),)
            store(h + first * H + row * H, i * PART + lane, sums[i], exists, H, (i + 1) * PART > H)
        values = sums
    if mean is not None:
        total = values[0]
        for i in tl.static_range(1, PARTS):
            total += values[i]
        average = tl.sum(total, axis=1, keep_dims=True) / H
        tl.store(mean + first + row, average, mask=exists)
        centred = ()
        for i in tl.static_range(PARTS):
            if (i + 1) * PART > H:
                centred += (tl.where(i * PART + lane < H, values[i] - average, 0.0),)
            else:
                centred += (values[i] - average,)
        values = centred
    squares = values[0] * values[0]
    for i in tl.static_range(1, PARTS):
        squares += values[i] * values[i]
    inverse = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) * (1.0 / H) + eps)
    tl.store(rstd + first + row, inverse, mask=exists)
    for i in tl.static_range(PARTS):
        cols = i * PART + lane
        xhat = values[i] * inverse
        result = scale_and_shift(xhat, weight, bias, cols, dtype, H, (i + 1) * PART > H, PLUS_ONE, ROUND)
        store(y + first * H + row * H, cols, result, exists, H, (i + 1) * PART > H)


@triton.jit(do_not_specialize=["M"])
def norm_forward_wide(
    x, x_stride, residual, residual_stride, weight, bias, y, h, mean, rstd, M, eps,
    H: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PLUS_ONE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = PARTS * PART != H
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    average = 0.0
    squares = 0.0
    for i in range(PARTS):
        cols = i * PART + tl.arange(0, PART)
        value = load(rows_at(x, x_stride, row, 0, H), cols, H, PADDED)
        if residual is not None:
            value = (
                (value + load(rows_at(residual, residual_stride, row, 0, H), cols, H, PADDED)).to(dtype).to(tl.float32)
            )
            tl.store(h + row * H + cols, value.to(dtype), mask=cols < H)
        if mean is not None:
            count = tl.sum(tl.where(cols < H, 1.0, 0.0))
            share = count / (i * PART + count)
            step = tl.sum(value) / count - average
            value = tl.where(cols < H, value - (average + step), 0.0)
            squares += step * step * (i * PART) * share
            average += step * share
        squares += tl.sum(value * value)
    inverse = tl.rsqrt(squares * (1.0 / H) + eps)
    tl.store(rstd + row, inverse)
    if mean is not None:
        tl.store(mean + row, average)
    for i in range(PARTS):
        cols = i * PART + tl.arange(0, PART)
        if residual is not None:
            value = load(h + row * H, cols, H, PADDED)
        else:
            value = load(rows_at(x, x_stride, row, 0, H), cols, H, PADDED)
        xhat = (value - average) * inverse
        result = scale_and_shift(xhat, weight, bias, cols, dtype, H, PADDED, PLUS_ONE, ROUND)
        tl.store(y + row * H + cols, result.to(y.dtype.element_ty), mask=cols < H)


def with_row_stride(tensor: Tensor) -> tuple[Tensor, int | None]:
    """``tensor`` [..., H] as rows at one stride, and that stride, None for contiguous rows; a copy only where there is
    no such stride."""
    outer = [(size, step) for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
    even = all(a_step == b_size * b_step for (_, a_step), (b_size, b_step) in zip(outer, outer[1:], strict=False))
    if not even or (tensor.shape[-1] != 1 and tensor.stride(-1) != 1):
        return tensor.contiguous(), None
    stride = outer[-1][1] if outer else tensor.shape[-1]
    return tensor, None if stride == tensor.shape[-1] else stride


def vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, y: Tensor, h: Tensor | None,
    mean: Tensor | None, rstd: Tensor, eps: float, plus_one: bool, round_first: bool,
) -> None:  # fmt: skip
    rows, cols = rstd.numel(), x.shape[-1]
    tiling = plan(rows, cols)
    x, x_stride = with_row_stride(x)
    residual, residual_stride = (None, None) if residual is None else with_row_stride(residual)
    launch(
        norm_forward_wide if tiling.wide else norm_forward,
        (tiling.programs,),
        *(x, x_stride, residual, residual_stride, vector(weight), vector(bias), y, h, mean, rstd, rows, eps),
        options={"num_warps": tiling.warps, "maxnreg": MAX_REGISTERS},
        H=cols,
        PART=tiling.part,
        PARTS=tiling.parts,
        PLUS_ONE=plus_one,
        ROUND=round_first,
        **({} if tiling.wide else {"ROWS": tiling.rows}),
    )


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    rounds = mode == "llama"
    out_dtype = torch.promote_types(x.dtype, weight.dtype) if rounds and weight is not None else x.dtype
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _forward(x, residual, weight, None, y, h, None, rstd, eps, mode == "gemma", rounds)
    return y, x.new_empty(0) if h is None else h, rstd


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    _forward(x, None, weight, bias, y, None, mean, rstd, eps, False, False)
    return y, mean, rstd


# Instructions per element on sm_90 in bf16, counted by hand. RMSNorm: x, w, y in vectors of 8: 3/8; convert x 1.5 (the
# first count, 14 for the kernel, took 1; the compiler takes two for every other element), into the sum of squares 1,
# times rstd 1, round and back 2 (llama), convert w 1.5, times w 1, convert y 1/2: 8.9, less where the products of
# "llama" are packed; fixed 50 per thread of 32 elements. Sum <= 10. The residual adds 4. LayerNorm with bias adds 3.6
# and 25 more for its reduction, but lacks the 2 of "llama": 11.5 + 75/24 for the three parts of 768 columns.
# Wide rows have no budget: their loops over parts are partly unrolled.
BUDGETS = {
    "norm_forward": Budget(lambda a: a["ROWS"] * a["PART"] * a["PARTS"], 15.0),
}
