"""Dropout masks inside Triton kernels: the words of dropout.py's stream, four for every Philox call.

    word(i) = Philox4x32-10(counter = i // 4 as 64 bits in (c0, c1), key = seed)[i % 4],   i = row * K + column

One call costs about 50 integer instructions and gives the words of four consecutive elements, so a thread should own
all four. ``keep_mask`` draws one call per quad of columns where rows start on a quad (K % 4 == 0) and interleaves the
words; otherwise every element makes its own call and picks its word, which costs four times as much.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(counters, seed):
    """The four uint32 words of each 64-bit counter under the 64-bit seed; the shape of ``counters`` four times."""
    counters = counters.to(tl.uint64)
    low, high = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    # Products as umulhi and multiply, not as one 64-bit multiply: Triton weighs a layout change of the mask against
    # the bytes of arithmetic behind it, and with 64-bit arithmetic it sends the mask through shared memory.
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def keep_mask(rows, first_column, K, seed, threshold, COLUMNS: tl.constexpr, QUADS: tl.constexpr):
    """Which elements of a tile of the contiguous [M, K] input dropout keeps, as a boolean tensor [ROWS, COLUMNS].

    Args:
        rows: [ROWS] int64, row numbers in [0, M); rows outside give a mask that means nothing and touch no memory.
        first_column: the tile's first column, a multiple of 4; columns past K likewise mean nothing.
        K: the input's row length.
        seed: the 64-bit seed as an integer scalar; list it in the kernel's ``do_not_specialize``.
        threshold: dropout.threshold(p), a run-time or constexpr integer; also ``do_not_specialize``.
        COLUMNS: the tile's width, a power of two, at least 4.
        QUADS: whether K % 4 == 0, decided by the launcher.

    Kept elements are x * (1 / (1 - p)) in fp32, rounded once to x's dtype.
    """
    limit = tl.cast(threshold, tl.uint32)
    starts = rows.to(tl.int64) * K + first_column
    if QUADS:
        counters = (starts // 4)[:, None] + tl.arange(0, COLUMNS // 4)[None, :]
        w0, w1, w2, w3 = philox_words(counters, seed)
        return tl.interleave(tl.interleave(w0 >= limit, w2 >= limit), tl.interleave(w1 >= limit, w3 >= limit))
    else:
        elements = starts[:, None] + tl.arange(0, COLUMNS)[None, :]
        w0, w1, w2, w3 = philox_words(elements // 4, seed)
        lane = elements % 4
        return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)) >= limit
