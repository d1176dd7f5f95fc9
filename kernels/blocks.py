"""Row blocks: how the plain-torch references walk over a large tensor on CPU.

A reference that casts a whole bf16 tensor to fp32 writes and reads 4 bytes per element and pass through DRAM. Cut into
blocks whose fp32 temporaries stay in the L2 cache, only the inputs and outputs travel. 2^18 elements (1 MB in fp32) was
the best of 2^16 ... 2^22 for SwiGLU [1024, 2816] bf16 (1.7 ms; 2.4 ms with 2^16, where the cost of calling an op shows,
3.5 ms with 2^22). Other devices get one block: there a launch costs more than the temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rms_norm import accumulator

BLOCK_ELEMENTS = 1 << 18


def block_rows(width: int, device: torch.device, rows: int) -> int:
    """How many rows of ``width`` elements make a block; at least one. A function of shapes and device type only."""
    return max(1, BLOCK_ELEMENTS // max(1, width)) if device.type == "cpu" else max(1, rows)


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover ``range(rows)``; none when ``rows`` is 0."""
    step = block_rows(width, device, rows)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def scratch_blocks(x: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """``row_blocks`` of x [M, I], each with ``buffers`` accumulator-dtype buffers of its size, allocated once: fresh
    temporaries cost a third of SwiGLU's time in page faults."""
    rows, width = x.shape
    step = min(rows, block_rows(width, x.device, rows))
    scratch = torch.empty(buffers, step, width, dtype=accumulator(x.dtype), device=x.device)
    for block in row_blocks(rows, width, x.device):
        yield block, list(scratch[:, : block.stop - block.start])


def load(x: Tensor, buffer: Tensor) -> Tensor:
    """x in the buffer's dtype: x itself (not to be written) or its copy in ``buffer``."""
    return x if x.dtype == buffer.dtype else buffer.copy_(x)


def multiply(a: Tensor, b: Tensor, *, out: Tensor, scratch: Tensor) -> None:
    """out = a * b, computed in the dtype of ``scratch`` (which may be a or b) and rounded once."""
    if out.dtype == scratch.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(torch.mul(a, b, out=scratch))
