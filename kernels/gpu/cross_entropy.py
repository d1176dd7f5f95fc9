"""The row pass of cross-entropy in one launch: loss, log-sum-exp, entropy, and the gradient, which may overwrite the
logits. Formulas: ``kernels/cross_entropy.py`` and ``cross_entropy_rows.py``.

A program goes over a row once with an online softmax and, for the gradient, a second time. A block of the row is
[VECTORS, WIDTH]: WIDTH logits are one 16-byte access and stay within a thread, which keeps a running maximum m and sums
for each of its vectors, so the loop needs no barrier and one rescaling serves WIDTH logits:

    m' = max(m, z_1 ... z_WIDTH)     s' = s exp(m - m') + sum_j exp(z_j - m')

The threads' (m, s) meet once per row. Logits beyond the last whole vector (V mod WIDTH) are handled apart, so that the
masks of the loop never cut a vector; an ignored row is not read. The label's own gradient is stored last, behind a
barrier: to look for it in the loop would cost two instructions per logit.

Bytes, n logits of b bytes: nb without gradient; with it 2nb, and nb more where the second read misses the L2 cache. To
hit, few rows may be in flight: the grid fills each multiprocessor with 1024 threads once and loops over the rows. That
is 132 rows of 128256 bf16 logits on an H100: 34 MB in an L2 of 50 MB. Splitting a row over programs would pay only for
fewer rows than multiprocessors: 64 rows of 128256 take 2 x 4 us with one program each (70 GB/s a multiprocessor),
next to 2 x 0.24 ms for the two GEMMs' reads of a head of 1 GB.

Numerics: z - m is one subtraction, rounded at most once, as in stock's log_softmax; then it is multiplied by log2 e for
``ex2.approx`` (relative error 2^-22.5). The exp of a logit d below the maximum errs by 2^-22.5 + |d| 2^-24 of itself
and enters the sum with weight exp(-|d|), which damps the second term below 2^-25. Stock's exp(z - max - log sum) rounds
its argument likewise and ends in the same instruction. exp2(z log2 e - m log2 e) as one FMA would save an instruction
but rounds m log2 e: by 2^-18 for m = 100, more than the loss of a confident row, whose top - z_y must be exact.
Deterministic: a fixed tree of sums, no atomics. int64 row offsets.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..cross_entropy_rows import Out, Terms
from .aot import Budget
from .launch import launch, sm_count

VECTOR_BYTES = 16
VECTORS_PER_THREAD = 4  # 64 bytes in flight a thread; half with a soft-cap and half with an entropy: registers
SCALARS_PER_THREAD = 8
THREADS = 1024  # of a multiprocessor's programs together
REGISTERS = 65536 // THREADS  # without this limit ptxas spills some variants, to fit twice as many threads
NOTHING = Out()
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a running maximum before any logit: finite, so that exp(-inf - m) is 0 and not NaN


@triton.jit
def _exp(d):
    """``tl.exp`` is ex2.approx without flush to zero: three more instructions, which only keep results below 2^-126."""
    return tl.exp2(d * LOG2_E)


@triton.jit
def _tanh(u, EXACT: tl.constexpr):
    """1 - 2 / (e^2u + 1), with an absolute error of 2^-21. EXACT: from |u|, with the sign of u, and below 5/8, where
    that would lose digits, u + u^3 p(u^2). rsqrt squared is the reciprocal without the range checks of a division."""
    if EXACT:
        size = tl.abs(u)
        root = tl.rsqrt(tl.exp2(size * (2 * LOG2_E)) + 1.0)
        large = tl.fma(-2.0 * root, root, 1.0)
        square = u * u
        p = tl.fma(square, -0.00570498779, 0.020639088)
        p = tl.fma(p, square, -0.0537397154)
        p = tl.fma(p, square, 0.133314416)
        p = tl.fma(p, square, -0.333332807)
        return tl.where(size < 0.625, tl.fma(square * u, p, u), tl.where(u < 0, -large, large))
    root = tl.rsqrt(tl.exp2(u * (2 * LOG2_E)) + 1.0)
    return tl.fma(-2.0 * root, root, 1.0)


@triton.jit
def _logit(x, scale, cap, per_cap, SCALED: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    z = x.to(tl.float32)
    if SCALED:
        z = z * scale
    if CAPPED:
        z = cap * _tanh(z * per_cap, EXACT)
    return z


@triton.jit
def _slope(z, part, top, per_exp, uniform, turn, surprise, per_cap, SMOOTH: tl.constexpr, TURNED: tl.constexpr,
           CAPPED: tl.constexpr):  # fmt: skip
    """dx = (e (per_exp + turn (-surprise - d)) - uniform - part) (1 - (z / c)^2), d = z - top; part: the label's."""
    d = z - top
    e = _exp(d)
    if TURNED:
        g = e * tl.where(e > 0, tl.fma(turn, -surprise - d, per_exp), per_exp)  # d is -inf where e is 0
    else:
        g = e * per_exp
    if SMOOTH:
        g -= uniform
    g -= part
    if CAPPED:
        t = z * per_cap
        g *= tl.fma(-t, t, 1.0)
    return g


@triton.jit
def _block_sums(
    x_row, read, scale, cap, per_cap,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr,
    SURPRISE: tl.constexpr,
):  # fmt: skip
    """For each vector of a block, over the first ``read`` vectors of the row: the maximum m, sum e, sum e d and sum z,
    where d = z - m and e = exp(d)."""
    m = tl.full([VECTORS], LOWEST, tl.float32)
    s = tl.zeros([VECTORS], tl.float32)
    below = tl.zeros([VECTORS], tl.float32)
    total_z = tl.zeros([VECTORS], tl.float32)
    for start in range(0, read, VECTORS):
        vector = (start + tl.arange(0, VECTORS))[:, None]
        inside = vector < read
        x = tl.load(x_row + vector * WIDTH + tl.arange(0, WIDTH)[None, :], mask=inside, other=-float("inf"))
        z = _logit(x, scale, cap, per_cap, SCALED, CAPPED, True)
        if SCALED or CAPPED:
            z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(m, tl.max(z, 1))
        d = z - higher[:, None]
        e = _exp(d)
        shrink = _exp(m - higher)
        if SURPRISE:
            below = (below + s * (m - higher)) * shrink + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
        s = s * shrink + tl.sum(e, 1)
        if SMOOTH:
            total_z += tl.sum(tl.where(inside, z, 0.0), 1)
        m = higher
    return m, s, below, total_z


@triton.jit
def _sums(
    x_row, read, rest_z, rest, scale, cap, per_cap,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, RAGGED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr, SURPRISE: tl.constexpr,
):  # fmt: skip
    """(maximum, sum e, -sum e d, sum z) of the row, ``rest_z`` where ``rest`` included."""
    m, s, below, total_z = _block_sums(
        x_row, read, scale, cap, per_cap, WIDTH, VECTORS, SCALED, CAPPED, SMOOTH, SURPRISE
    )
    top = tl.max(m, 0)
    if RAGGED:
        top = tl.maximum(top, tl.max(tl.where(rest, rest_z, LOWEST), 0))
    shrink = _exp(m - top)
    total = tl.sum(s * shrink, 0)
    surprise = 0.0
    sum_z = 0.0
    if SURPRISE:
        surprise = -tl.sum((below + s * (m - top)) * shrink, 0)
    if SMOOTH:
        sum_z = tl.sum(total_z, 0)
    if RAGGED:
        e = tl.where(rest, _exp(rest_z - top), 0.0)
        total += tl.sum(e, 0)
        if SURPRISE:
            surprise += tl.sum(tl.where(e > 0, e * (top - rest_z), 0.0), 0)
        if SMOOTH:
            sum_z += tl.sum(tl.where(rest, rest_z, 0.0), 0)
    return top, total, surprise, sum_z


@triton.jit
def _write_gradient(
    dx_row, x_row, read, vectors, vocab, rest_z, top, per_exp, uniform, turn, surprise, scale, cap, per_cap,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, RAGGED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The second pass. An ignored row comes with read, top and all factors 0, and so gets zeros."""
    dtype = dx_row.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32  # a 16-bit gradient rounds coarser than the short tanh
    for start in range(0, vectors, VECTORS):
        vector = (start + tl.arange(0, VECTORS))[:, None]
        column = vector * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_row + column, mask=vector < read, other=0.0)
        z = _logit(x, scale, cap, per_cap, SCALED, CAPPED, EXACT)
        g = _slope(z, 0.0, top, per_exp, uniform, turn, surprise, per_cap, SMOOTH, TURNED, CAPPED)
        tl.store(dx_row + column, g.to(dtype), mask=vector < vectors)
    if RAGGED:
        column = vectors * WIDTH + tl.arange(0, WIDTH)
        g = _slope(rest_z, 0.0, top, per_exp, uniform, turn, surprise, per_cap, SMOOTH, TURNED, CAPPED)
        tl.store(dx_row + column, g.to(dtype), mask=column < vocab)


@triton.jit
def _row(
    row, x_ptr, dx_ptr, labels_ptr, tokens_ptr, upstream_ptr, dentropy_ptr, loss_ptr, lse_ptr, entropy_ptr,
    x_stride, dx_stride, vocab, ignore_index, cap, per_cap, smoothing, scale, z_loss,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, RAGGED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr, SURPRISE: tl.constexpr,
):  # fmt: skip
    x_row = x_ptr + row * x_stride * WIDTH
    token = row if tokens_ptr is None else tl.load(tokens_ptr + row)
    label = tl.load(labels_ptr + token)
    valid = label != ignore_index
    # All threads read the label's logit and the rest before any of them writes a gradient over it.
    picked = _logit(tl.load(x_row + label, mask=valid, other=0.0), scale, cap, per_cap, SCALED, CAPPED, True)
    vectors = vocab // WIDTH
    read = tl.where(valid, vectors, 0)
    rest = False
    rest_z = 0.0
    if RAGGED:
        column = vectors * WIDTH + tl.arange(0, WIDTH)
        rest = valid & (column < vocab)
        rest_z = _logit(tl.load(x_row + column, mask=rest, other=0.0), scale, cap, per_cap, SCALED, CAPPED, True)
    top, total, surprise, sum_z = _sums(
        x_row, read, rest_z, rest, scale, cap, per_cap, WIDTH, VECTORS, RAGGED, SCALED, CAPPED, SMOOTH, SURPRISE
    )
    total = tl.where(total == 0, float("nan"), total)  # nothing but -inf: NaN, as stock
    top = tl.where(valid, top, 0.0)
    total = tl.where(valid, total, 1.0)
    surprise = tl.where(valid, surprise / total, 0.0)
    log_sum = tl.log(total)
    lse = top + log_sum
    loss = (top - picked) + log_sum + z_loss * lse * lse  # top - picked is exact for a confident row
    if SMOOTH:
        loss += smoothing * (picked - sum_z / vocab)
    upstream = 1.0 if upstream_ptr is None else tl.load(upstream_ptr + token).to(tl.float32)
    if WEIGHTED:
        loss *= upstream
    if loss_ptr is not None:
        tl.store(loss_ptr + token, tl.where(valid, loss, 0.0))
    if lse_ptr is not None:
        tl.store(lse_ptr + token, tl.where(valid, lse, 0.0))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + token, tl.where(valid, surprise + log_sum, 0.0))
    if dx_ptr is not None:
        dx_row = dx_ptr + row * dx_stride * WIDTH
        factor = tl.where(valid, upstream * scale, 0.0)
        per_exp = tl.where(valid, factor * (1.0 + 2.0 * z_loss * lse) / total, 0.0)
        uniform = factor * (smoothing / vocab)
        turn = 0.0
        TURNED: tl.constexpr = dentropy_ptr is not None
        if TURNED:
            turn = tl.where(valid, tl.load(dentropy_ptr + token).to(tl.float32) * scale / total, 0.0)
        _write_gradient(
            dx_row, x_row, read, vectors, vocab, rest_z, top, per_exp, uniform, turn, surprise, scale, cap, per_cap,
            WIDTH, VECTORS, RAGGED, SCALED, CAPPED, SMOOTH, TURNED,
        )  # fmt: skip
        part = factor * (1.0 - smoothing)
        g = _slope(picked, part, top, per_exp, uniform, turn, surprise, per_cap, SMOOTH, TURNED, CAPPED)
        tl.debug_barrier()
        tl.store(dx_row + label, g.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def cross_entropy_rows_kernel(
    x_ptr, dx_ptr, labels_ptr, tokens_ptr, upstream_ptr, dentropy_ptr, loss_ptr, lse_ptr, entropy_ptr,
    rows, x_stride, dx_stride, vocab, ignore_index, cap, per_cap, smoothing, scale, z_loss,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, RAGGED: tl.constexpr,
    CAPPED: tl.constexpr, SMOOTH: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, SURPRISE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    for start in range(0, rows - first, tl.num_programs(0)):
        _row(
            first.to(tl.int64) + start,
            x_ptr, dx_ptr, labels_ptr, tokens_ptr, upstream_ptr, dentropy_ptr, loss_ptr, lse_ptr, entropy_ptr,
            x_stride, dx_stride, vocab, ignore_index, cap, per_cap, smoothing, scale, z_loss,
            WIDTH, VECTORS, RAGGED, CAPPED, SMOOTH, SCALED, WEIGHTED, SURPRISE,
        )  # fmt: skip


def _width(*matrices: Tensor | None) -> int:
    """Logits of a 16-byte access, if the rows of all matrices start at 16-byte boundaries; else 1."""
    for x in matrices:
        if x is not None and (x.stride(0) | x.storage_offset()) * x.element_size() % VECTOR_BYTES:
            return 1
    return VECTOR_BYTES // matrices[0].element_size()


def warps_per_row(vocab: int, element_size: int) -> int:
    """32 from 128 KB a row on, so that every row has at least two blocks."""
    blocks = vocab * element_size // (2 * 32 * VECTORS_PER_THREAD * VECTOR_BYTES)
    return min(THREADS // 32, max(4, 1 << max(0, blocks.bit_length() - 1)))


def triton_rows(
    x: Tensor,
    labels: Tensor,
    terms: Terms,
    *,
    out: Out = NOTHING,
    tokens: Tensor | None = None,
    upstream: Tensor | None = None,
    dentropy: Tensor | None = None,
    dx: Tensor | None = None,
    weighted: bool = False,
) -> None:
    """The rows of x [n, V], without host synchronisation; of an ignored row only the zeros are written.

    Args:
        x: any strides; read in place if its columns are contiguous.
        labels, upstream, dentropy: one element for each token of the batch; upstream None is 1.
        out: where to write loss, log-sum-exp and entropy.
        tokens: [n] int64, row i belongs to token tokens[i]; None: to token i.
        dx: [n, V] with contiguous columns; may be x.
        weighted: the loss comes multiplied by upstream.
    """
    n, vocab = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    width, warps = _width(x, dx), warps_per_row(vocab, x.element_size())
    threads = 32 * warps
    surprise = out.entropy is not None or dentropy is not None
    per_thread = (SCALARS_PER_THREAD if width == 1 else VECTORS_PER_THREAD) >> (terms.softcap != 0) + surprise
    constants: dict[str, Any] = {
        "WIDTH": width,
        "VECTORS": threads * per_thread,
        "RAGGED": vocab % width != 0,
        "CAPPED": terms.softcap != 0,
        "SMOOTH": terms.label_smoothing != 0,
        "SCALED": terms.logit_scale != 1,
        "WEIGHTED": weighted and upstream is not None,
        "SURPRISE": surprise,
    }
    launch(
        cross_entropy_rows_kernel,
        (min(n, THREADS // threads * sm_count(x.device)),),
        *(x, dx),
        *(None if t is None else t.contiguous() for t in (labels, tokens, upstream, dentropy)),
        *out,
        *(n, x.stride(0) // width, 0 if dx is None else dx.stride(0) // width, vocab, terms.ignore_index),
        *(terms.softcap, 1 / terms.softcap if terms.softcap else 0.0),
        *(float(t) for t in (terms.label_smoothing, terms.logit_scale, terms.z_loss)),
        options={"num_warps": warps, "num_stages": 1, "maxnreg": REGISTERS},
        **constants,
    )


def _logit_passes(args: dict[str, Any]) -> int:
    """Logits of a block, once for each pass over them; a pass with a soft-cap counts twice."""
    return args["VECTORS"] * args["WIDTH"] * (1 if args["dx_ptr"] is None else 2) * (2 if args["CAPPED"] else 1)


# First pass, per bf16 logit: 1/8 load with address and mask (6 instructions), 1.5 to unpack, 1 maximum, 2 for the
# scaled difference, 1 exp, 1 sum, 4/8 to rescale: 8. Second pass: 2 to load, unpack and mask, 3 for exp, 1 product, 0.5
# to round, 1 to store with address and mask: 7.5. Once per row two reductions over 32 warps and the loss: 200
# instructions, 6 on each of the 32 logits that a thread holds. So 14 for the loss alone and 11 a pass with gradient.
# fp32 logits are 16 a thread: 6.5 + 12.5. The soft-cap adds 16 with the polynomial and 8 without.
BUDGETS = {"cross_entropy_rows_kernel": Budget(_logit_passes, 22.0)}
