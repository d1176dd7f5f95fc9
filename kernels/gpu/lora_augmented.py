"""The augmented GEMM of LoRA projections: the low-rank part as further columns of the reduction.

    Y = [X . S . S] [W . hi(c B) . lo(c B)]^T       X [M, K + R], W [N, K + R], R = ``room(ranks, split)``

for projections stacked along N whose adapters lie block-diagonally in the spare columns of W: one library GEMM for all
of them, no other pass over Y, no low-rank launch but ``pack``, which fills the spare columns of both buffers.

Not selectable behind ``lora_project``: X and W must come in buffers with R spare columns, which nobody hands over. The
engine would have to re-home the weights of q, k, v (and of gate and up) into one roomy buffer, leave the modules
strided views of it (``state_dict``, ``save_pretrained``, ``load_state_dict``, ``unpatch_model`` and optimisers that see
W would meet non-contiguous weights), re-home again when adapters are added or change their rank, and let the norm and
the GLU write X into roomy buffers too. That is not done before a GPU has measured what it buys: the prediction is that
a GEMM over K + 48 strided columns is at most 2 % slower than over K, and that addmm's extra pass costs 7-9 %.

Bytes of ``pack``, element size e: S and B read, e (M + N) R written; the GEMM reads R columns more.
Numerics: everything in one fp32 accumulator, one rounding. B is scaled in fp32, then rounded once or split in two.
Source: the block product [X S] [W B]^T = X W^T + S B^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .lora_gemm import SLOTS

ALIGNMENT = 8  # 16-byte rows of 2-byte elements


@triton.jit
def pack_kernel(
    x, w, s, b0, b1, b2, M, K, n0, n1, n2, r0, r1, r2, scaling0, scaling1, scaling2, width,
    stride_x, stride_w, stride_s, stride_b0, stride_b1, stride_b2,
    COUNT: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of the spare columns of X or, in the programs behind those, of W; WIDTH >= width columns."""
    tiles = tl.cdiv(M, BLOCK)
    pid = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    rank = r0
    if COUNT > 1:
        rank += r1
    if COUNT > 2:
        rank += r2
    column = c % rank
    used = c < (2 * rank if SPLIT else rank)
    if pid < tiles:
        rows = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = (rows[:, None] < M) & (c[None, :] < width)
        value = tl.load(s + rows[:, None] * stride_s + column[None, :], mask=inside & used[None, :], other=0.0)
        tl.store(x + rows[:, None] * stride_x + K + c[None, :], value, mask=inside)
    else:
        rows = (pid - tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        full = _block(tl.zeros((BLOCK, WIDTH), tl.float32), rows, column, b0, n0, r0, stride_b0, scaling0)
        total = n0
        if COUNT > 1:
            full = _block(full, rows - n0, column - r0, b1, n1, r1, stride_b1, scaling1)
            total += n1
        if COUNT > 2:
            full = _block(full, rows - n0 - n1, column - r0 - r1, b2, n2, r2, stride_b2, scaling2)
            total += n2
        high = full.to(w.dtype.element_ty)
        if SPLIT:
            high = tl.where(c[None, :] < rank, high, (full - high.to(tl.float32)).to(w.dtype.element_ty))
        value = tl.where(used[None, :], high, 0.0).to(w.dtype.element_ty)
        inside = (rows[:, None] < total) & (c[None, :] < width)
        tl.store(w + rows[:, None] * stride_w + K + c[None, :], value, mask=inside)


@triton.jit
def _block(full, rows, column, b, n, r, stride_b, scaling):
    """full + the adapter's block of scaling B, zero outside it."""
    inside = ((rows >= 0) & (rows < n))[:, None] & ((column >= 0) & (column < r))[None, :]
    value = tl.load(b + rows[:, None] * stride_b + column[None, :], mask=inside, other=0.0)
    return full + value.to(tl.float32) * scaling


def room(ranks: Sequence[int], split: bool) -> int:
    """The spare columns that X and W need, a multiple of 8; the ones that are not used hold zeros."""
    return -(-sum(ranks) * (2 if split else 1) // ALIGNMENT) * ALIGNMENT


def pack(
    x: Tensor, w: Tensor, k: int, widths: Sequence[int], s: Tensor, b: Sequence[Tensor], scalings: Sequence[float],
    split: bool,
) -> None:  # fmt: skip
    """Fill the columns from k on of x [M, k + R] and w [sum of widths, k + R], in one launch.

    Args:
        widths: N_i of each projection; projection i has adapter b[i] [N_i, r_i], its columns of s in order.
        split: enter c B as two parts.
    """
    ranks = [t.shape[1] for t in b]
    assert 1 <= len(b) == len(widths) <= SLOTS, "one adapter on each of at most three projections"
    assert x.stride(1) == w.stride(1) == s.stride(1) == 1 and all(t.stride(1) == 1 for t in b)
    assert x.shape[1] == w.shape[1] == k + room(ranks, split) and w.shape[0] == sum(widths)
    columns = triton.next_power_of_2(room(ranks, split))
    block = max(1, min(64, 4096 // columns))

    def padded(values: Sequence[object], missing: object) -> list[object]:
        return [*values, *[missing] * (SLOTS - len(values))]

    launch(
        pack_kernel,
        (triton.cdiv(x.shape[0], block) + triton.cdiv(w.shape[0], block),),
        *(x, w, s, *padded(b, None), x.shape[0], k),
        *padded(widths, 0),
        *padded(ranks, 0),
        *padded([float(scaling) for scaling in scalings], 0.0),
        *(room(ranks, split), x.stride(0), w.stride(0), s.stride(0)),
        *padded([t.stride(0) for t in b], 0),
        options=dict(num_warps=4),
        COUNT=len(b),
        SPLIT=split,
        BLOCK=block,
        WIDTH=columns,
    )


def project_augmented(
    x: Tensor, w: Tensor, k: int, widths: Sequence[int], s: Tensor, b: Sequence[Tensor], scalings: Sequence[float],
    split: bool, bias: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Y_i [M, N_i] as column views of one [M, sum N] result; ``pack`` says what x and w are, bias is [sum N]."""
    pack(x, w, k, widths, s, b, scalings, split)
    return list(torch.nn.functional.linear(x, w, bias).split(list(widths), dim=1))
