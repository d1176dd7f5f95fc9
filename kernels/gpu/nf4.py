"""Triton kernels of nf4.py: 4-bit weights to fp32, bf16 or fp16 in one launch, and back.

    dequantise  W_i = round(code[q_i] * scale_b),    scale_b = absmax_b  or  code2[absmax_b] * absmax2[b // b2] + offset
    quantise    absmax_b = max |W_i|,    q_i = nibble of the code nearest to W_i / absmax_b
    scales      the same once more, with the mean taken off and 256 codes

Shapes: the flattened weight in pieces of BLOCK elements, a multiple of every block size. Dequantise reads 32-bit words
of 8 codes, 16 bytes per access, and looks nibbles up in a table in shared memory (``tl.gather``): 6 instructions per
weight on sm_90, where a table in global memory took 7.8 for its 64-bit addresses and compares and selects 24. The data
may have any length: the bytes behind the last whole word are read one by one.

Bytes, n weights of b bytes: 0.5n + scales + nb, either way. Saved: nothing.
Numerics: the reference's bits. Products, sums and quotients are rounded separately: fused multiply-add is off, and
division is the IEEE one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..nf4 import code_bounds
from ..nf4_scales import blocks_of, middles
from .aot import Budget
from .launch import launch

BLOCK, WARPS = 8192, 4  # 64 weights per thread: two 16-byte loads of codes in flight, 24 warps on a multiprocessor


@triton.jit
def tail_word(data_ptr, word, size):
    """32-bit word ``word`` of ``size`` bytes, zeros behind their end."""
    at = word * 4 + tl.arange(0, 4)
    parts = tl.load(data_ptr + at, mask=at < size, other=0).to(tl.int32)
    return tl.sum(parts << (8 * tl.arange(0, 4)), 0)


@triton.jit
def block_scales(
    absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, first, local, blocks, BLOCKSIZE2: tl.constexpr, SPAN: tl.constexpr
):
    """fp32 scales of the blocks first + local; ``first`` is a multiple of SPAN and ``local`` below it."""
    inside = local < blocks - first
    scale = tl.load(absmax_ptr + first + local, mask=inside, other=0)
    if absmax2_ptr is not None:
        if BLOCKSIZE2 % SPAN == 0:
            outer = tl.load(absmax2_ptr + first // BLOCKSIZE2)
        else:
            outer = tl.load(absmax2_ptr + (first + local) // BLOCKSIZE2, mask=inside, other=0.0)
        scale = tl.load(code2_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    return scale


@triton.jit
def _dequantize_piece(
    out_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, n, blocks, first,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Elements first ... first + BLOCK as ROWS x COLS, one scale per row; WHOLE: all of them exist."""
    ROWS: tl.constexpr = BLOCK // COLS
    WORDS: tl.constexpr = COLS // 8
    SPAN: tl.constexpr = BLOCK // BLOCKSIZE
    rows = tl.arange(0, ROWS)
    at = rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words_ptr = data_ptr.to(tl.pointer_type(tl.int32)) + first // 8 + at
    if WHOLE:
        words = tl.load(words_ptr, eviction_policy="evict_first")
    else:
        whole = (n + 1) // 2 // 4 - first // 8
        words = tl.load(words_ptr, mask=at < whole, other=0)
        words = tl.where(at == whole, tail_word(data_ptr, (n + 1) // 2 // 4, (n + 1) // 2), words)
    local = rows * COLS // BLOCKSIZE
    scale = block_scales(
        absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, first // BLOCKSIZE, local, blocks, BLOCKSIZE2, SPAN
    )
    shifts = 4 * (tl.arange(0, 8) ^ 1)  # the even element of a byte is its high nibble
    nibbles = tl.reshape((words[:, :, None] >> shifts[None, None, :]) & 15, (BLOCK,))
    values = tl.reshape(tl.gather(tl.load(code_ptr + tl.arange(0, 16)), nibbles, 0), (ROWS, COLS)) * scale[:, None]
    local = rows[:, None] * COLS + tl.arange(0, COLS)[None, :]
    if WHOLE:
        tl.store(out_ptr + first + local, values.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + first + local, values.to(out_ptr.dtype.element_ty), mask=local < n - first)


@triton.jit
def _dequantize(
    out_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, n, blocks,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if EVEN:
        _dequantize_piece(out_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, n, blocks, first,
                          BLOCKSIZE, BLOCKSIZE2, True, BLOCK, COLS)  # fmt: skip
    elif n - first >= BLOCK:
        _dequantize_piece(out_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, n, blocks, first,
                          BLOCKSIZE, BLOCKSIZE2, True, BLOCK, COLS)  # fmt: skip
    else:
        _dequantize_piece(out_ptr, data_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, n, blocks, first,
                          BLOCKSIZE, BLOCKSIZE2, False, BLOCK, COLS)  # fmt: skip


def word_aligned(data: Tensor) -> Tensor:
    """The bytes, at an address that 32-bit words can be read from."""
    return data if data.data_ptr() % 4 == 0 else data.clone()


def dequantize_4bit(
    data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, blocksize2: int, rows: int, cols: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The op's launcher."""
    out = torch.empty(rows, cols, dtype=dtype, device=data.device)
    n = rows * cols
    launch(
        _dequantize,
        (triton.cdiv(n, BLOCK),),
        *(out, word_aligned(data), absmax, code, absmax2, code2, offset, n, blocks_of(n, blocksize)),
        options=dict(num_warps=WARPS, enable_fp_fusion=False),
        BLOCKSIZE=blocksize,
        BLOCKSIZE2=blocksize2,
        EVEN=n % BLOCK == 0,
        BLOCK=BLOCK,
        COLS=min(blocksize, 64),
    )
    return out


@triton.jit
def _quantize_piece(
    data_ptr, absmax_ptr, w_ptr, bounds_ptr, order_ptr, n, first,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """ROWS blocks from element ``first`` on. The number of bounds below a value, sent through ``order``, is its nibble;
    it is found by bisection in a table in shared memory. Only a last block that is not full is divided."""
    SIZE: tl.constexpr = ROWS * BLOCKSIZE
    rows = tl.arange(0, ROWS)
    local = rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    if WHOLE:
        w = tl.load(w_ptr + first + local).to(tl.float32)
    else:
        w = tl.load(w_ptr + first + local, mask=local < n - first, other=0.0).to(tl.float32)
    # The bits of magnitudes ascend with them, and those of NaN are above all: tl.max would pass it over.
    absmax = tl.max(tl.abs(w).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    least = tl.full((ROWS,), 1e-38, tl.float32)  # subnormal: a bare literal would be fp64
    above = tl.where(absmax < least, least, absmax)  # NaN stays
    scaled = w * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), above)[:, None]
    if not WHOLE:
        full = (rows + 1) * BLOCKSIZE <= n - first
        scaled = tl.where(full[:, None], scaled, tl.div_rn(w, tl.broadcast_to(above[:, None], (ROWS, BLOCKSIZE))))
        absmax = tl.where(full, absmax, above)
    values = tl.reshape(scaled, (SIZE,))
    sixteen = tl.arange(0, 16)
    bounds = tl.load(bounds_ptr + sixteen, mask=sixteen < 15, other=float("inf"))
    index = tl.where(values <= tl.load(bounds_ptr + 7), 0, 8)  # NaN is above all
    for i in tl.static_range(3):
        index += tl.where(values <= tl.gather(bounds, index + (3 >> i), 0), 0, 4 >> i)
    nibbles = tl.gather(tl.load(order_ptr + sixteen).to(tl.int32), index, 0)
    high, low = tl.split(tl.reshape(nibbles, (SIZE // 2, 2)))
    pairs = (high * 16 + low).to(tl.uint8)
    at = tl.arange(0, SIZE // 2)
    if WHOLE:
        tl.store(data_ptr + first // 2 + at, pairs)
        tl.store(absmax_ptr + first // BLOCKSIZE + rows, absmax)
    else:
        tl.store(data_ptr + first // 2 + at, pairs, mask=at < (n + 1) // 2 - first // 2)
        tl.store(absmax_ptr + first // BLOCKSIZE + rows, absmax, mask=rows * BLOCKSIZE < n - first)


@triton.jit
def _quantize(
    data_ptr, absmax_ptr, w_ptr, bounds_ptr, order_ptr, n,
    BLOCKSIZE: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (ROWS * BLOCKSIZE)
    if EVEN:
        _quantize_piece(data_ptr, absmax_ptr, w_ptr, bounds_ptr, order_ptr, n, first, BLOCKSIZE, ROWS, True)
    elif n - first >= ROWS * BLOCKSIZE:
        _quantize_piece(data_ptr, absmax_ptr, w_ptr, bounds_ptr, order_ptr, n, first, BLOCKSIZE, ROWS, True)
    else:
        _quantize_piece(data_ptr, absmax_ptr, w_ptr, bounds_ptr, order_ptr, n, first, BLOCKSIZE, ROWS, False)


def quantize_4bit(w: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The op's launcher."""
    w = w.contiguous()
    n = w.numel()
    data = torch.empty(triton.cdiv(n, 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks_of(n, blocksize), dtype=torch.float32, device=w.device)
    bounds, order = code_bounds(code)
    rows = 4096 // blocksize
    launch(
        _quantize,
        (triton.cdiv(n, rows * blocksize),),
        *(data, absmax, w, bounds, order, n),
        options=dict(num_warps=WARPS, enable_fp_fusion=False),
        BLOCKSIZE=blocksize,
        ROWS=rows,
        EVEN=n % (rows * blocksize) == 0,
    )
    return data, absmax


@triton.jit
def _quantize_absmax(
    codes_ptr, absmax2_ptr, absmax_ptr, offset_ptr, bounds_ptr, n, BLOCKSIZE2: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS blocks of scales less the offset: their largest magnitudes, and the codes nearest to the normalised scales
    as bitsandbytes' CPU path rounds them, to one of 65536 steps of [-1, 1]."""
    first = tl.program_id(0).to(tl.int64) * (ROWS * BLOCKSIZE2)
    rows = tl.arange(0, ROWS)
    local = rows[:, None] * BLOCKSIZE2 + tl.arange(0, BLOCKSIZE2)[None, :]
    inside = local < n - first
    scales = tl.load(absmax_ptr + first + local, mask=inside, other=0.0)
    scales = tl.where(inside, scales - tl.load(offset_ptr), 0.0)
    largest = tl.max(tl.abs(scales), 1)
    scaled = scales * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), largest)[:, None]
    clamped = tl.where(scaled < -1.0, -1.0, tl.where(scaled > 1.0, 1.0, scaled))
    step = (clamped + 1.0) * 0.5 * 65535.0 + 0.5
    step = tl.where(step >= 0.0, step, 0.0).to(tl.int32).to(tl.float32)  # 0 / 0 of a block of zeros is step 0
    value = tl.div_rn(2.0 * step, tl.full((ROWS, BLOCKSIZE2), 65535.0, tl.float32)) - 1.0
    flat = tl.reshape(value, (ROWS * BLOCKSIZE2,))
    at = tl.arange(0, 256)
    bounds = tl.load(bounds_ptr + at, mask=at < 255, other=float("inf"))
    below = tl.where(flat > tl.load(bounds_ptr + 127), 128, 0)  # bisection in a table in shared memory
    for i in tl.static_range(7):
        below += tl.where(flat > tl.gather(bounds, below + ((64 >> i) - 1), 0), 64 >> i, 0)
    below = tl.reshape(below, (ROWS, BLOCKSIZE2))
    tl.store(codes_ptr + first + local, below.to(tl.uint8), mask=inside)
    tl.store(absmax2_ptr + first // BLOCKSIZE2 + rows, largest, mask=rows * BLOCKSIZE2 < n - first)


def quantize_absmax(absmax: Tensor, code2: Tensor, blocksize2: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op's launcher; the mean is torch's, as in bitsandbytes."""
    absmax = absmax.contiguous()
    n, rows = absmax.numel(), 2048 // blocksize2
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(blocks_of(n, blocksize2), dtype=torch.float32, device=absmax.device)
    offset, bounds = absmax.mean(), middles(code2)
    launch(
        _quantize_absmax,
        (triton.cdiv(n, rows * blocksize2),),
        *(codes, absmax2, absmax, offset, bounds, n),
        options=dict(num_warps=WARPS, enable_fp_fusion=False),
        BLOCKSIZE2=blocksize2,
        ROWS=rows,
    )
    return codes, absmax2, offset


# Dequantise, per weight: shift 1, mask 1, table lookup 1, product 1, half a conversion of two 0.5. Per thread of 64:
# 2 loads, 8 stores, words and scales through shared memory 12, scales and addresses 60: 1.3. Quantise, per weight:
# magnitude, maximum, product and clamping 5, first comparison 2, three more with an address, a lookup, a comparison, a
# selection and a sum 15, the nibble's lookup 2, packing 2. Per thread of 32 weights: two levels of shared memory,
# reductions, two divisions, loads, stores and addresses: 200, 7 per weight. Scales, per
# scale: a division 10, rounding and clamping 12, eight times an address, a lookup, a comparison, a selection and a sum
# 40, and per thread of 16 reductions, shared memory, a division, loads, stores and masks 320: 82 were counted, 80 to 86
# came out where blocks are whole and 114 to 122 with masks; the limit was set after. 64 weights share a scale.
BUDGETS = {
    "_dequantize": Budget(lambda args: args["BLOCK"], 7),
    "_quantize": Budget(lambda args: args["ROWS"] * args["BLOCKSIZE"], 38),
    "_quantize_absmax": Budget(lambda args: args["ROWS"] * args["BLOCKSIZE2"], 125),
}
