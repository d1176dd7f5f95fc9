"""How the fused products with 4-bit weights are cut into programs; needs no Triton, so that cost models read it too.

A program owns OUT output features of at most 64 rows of X and walks over the reduced dimension. Where such programs are
fewer than PER_PROCESSOR per multiprocessor, the reduced dimension is split among several of them: their fp32 partial
sums are written and added in order by a second launch, so the same shapes give the same bits on one kind of device. The
partial sums never outweigh the weight itself, and a program keeps at least STEPS steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import sm_count

PER_PROCESSOR, STEPS = 4, 4


class Plan(NamedTuple):
    """A tile of W: ``block_n`` rows of ``words`` words of 8 columns; ``block_m`` rows of X; ``splits`` parts of
    ``steps`` tiles along the reduced dimension; ``warps`` of a program."""

    block_n: int
    words: int
    block_m: int
    splits: int
    steps: int
    warps: int

    def out_block(self, transpose: bool) -> int:
        return self.words * 8 if transpose else self.block_n

    def red_block(self, transpose: bool) -> int:
        return self.block_n if transpose else self.words * 8

    def partial_bytes(self, m: int, width: int) -> int:
        """Bytes of the fp32 partial sums: none without a split."""
        return 4 * m * width * self.splits if self.splits > 1 else 0


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan(x: Tensor, rows: int, cols: int, transpose: bool) -> Plan:
    """The plan for X [M, cols], or [M, rows] if ``transpose``, and W [rows, cols]."""
    m, exact = x.shape[0], x.dtype == torch.float32  # on FMA units: small tiles
    block_n, words = (32, 4) if exact else (64, 16 if cols % 128 == 0 else 8)
    block_m = 16 if m <= 16 or exact else 32 if m <= 32 else 64
    whole = Plan(block_n, words, block_m, 1, 0, 8 if block_m == 64 else 4)
    width, depth = (cols, rows) if transpose else (rows, cols)
    steps = max(1, _ceil_div(depth, whole.red_block(transpose)))
    programs = max(1, _ceil_div(width, whole.out_block(transpose)) * _ceil_div(m, block_m))
    wanted = _ceil_div(PER_PROCESSOR * sm_count(x.device), programs)
    most = min(wanted, steps // STEPS, depth // (16 * max(m, 1)))  # half a byte per weight against 8 per partial sum
    each = _ceil_div(steps, max(1, most))
    return whole._replace(splits=_ceil_div(steps, each), steps=each)
