"""Triton kernel of dropout.py: y = round(x * (1 / (1 - p))) where the element's Philox word says keep, else 0.

Shapes: any, as one row of n elements; x is copied first unless it is contiguous, for the mask counts the contiguous
elements. Bytes: 2nb. Numerics: the reference's bits, one fp32 product and one rounding. A thread owns two quads of
16-bit elements (one of 32-bit ones) per access and makes one Philox call for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold
from .aot import Budget
from .launch import launch
from .philox import keep_mask

BLOCK, WARPS = 4096, 8  # 16 elements per thread: two 16-byte loads in flight for bf16, four Philox calls


@triton.jit(do_not_specialize=["seed", "limit"])
def _dropout(y_ptr, x_ptr, n, seed, limit, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < n
    x = tl.load(x_ptr + index, mask=inside).to(tl.float32)
    keep = keep_mask(row, 0, BLOCK, seed, limit, BLOCK, True)
    tl.store(y_ptr + index, tl.where(keep, x * scale, 0.0), mask=inside)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """The op's launcher; ``seed`` is on the CPU, so that reading it waits for nothing."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    numbers = (x.numel(), int(seed), threshold(p), 1.0 / (1.0 - p))
    launch(_dropout, (triton.cdiv(x.numel(), BLOCK),), y, x, *numbers, options=dict(num_warps=WARPS), BLOCK=BLOCK)
    return y


# A Philox call: 10 rounds of 2 products of two instructions and 2 three-input xors, less 5 products of zero words in
# the first rounds: 55, 14 per element. Compare, scale, select and the conversions 5; per thread of 16 elements 2 loads,
# 2 stores, 18 key additions, addresses and bounds: 60, 4 per element.
BUDGETS = {"_dropout": Budget(lambda args: args["BLOCK"], 24)}
