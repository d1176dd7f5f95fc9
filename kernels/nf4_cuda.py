"""CUDA launchers of the 4-bit ops: csrc/cuda/nf4.cu on a tensor's device and its current stream.

Dequantise takes any weight. The product takes at most 8 rows of bf16 or fp16, whose K is a multiple of 64, on compute
capability 8.0 and later. It multiplies x by codes rounded to 11 bits and then scales the sums in fp32, so its weights
are nearer to the 4-bit ones than weights rounded to bf16 are; see csrc/cuda/nf4_matmul.cuh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, native_cuda
from .gpu.launch import capability

MAX_ROWS, CHUNK = 8, 64  # kMaxM and kChunk of csrc/cuda/nf4_matmul.cuh


def dequantize_4bit(
    data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, blocksize2: int, rows: int, cols: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The op's launcher."""
    out = torch.empty(rows, cols, dtype=dtype, device=data.device)
    native_cuda.call(
        "fuselora_cuda_dequantize_4bit",
        data.device,
        *map(native.pointer, (out, data, absmax, code, absmax2, code2, offset)),
        *(rows * cols, blocksize, blocksize2, native.DTYPE[dtype]),
    )
    return out


def dequantize_refusal(
    data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None,
    blocksize: int, blocksize2: int, rows: int, cols: int, dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why ``dequantize_4bit`` can't take these arguments, or None."""
    if code.dtype != torch.float32:
        return f"the code is {code.dtype}"
    return native_cuda.unsupported(data, dtype)


def matmul_4bit(
    x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None,
    offset: Tensor | None, blocksize: int, blocksize2: int, rows: int, cols: int, bias: Tensor | None, transpose: bool,
) -> Tensor:  # fmt: skip
    """The op's launcher, for transpose=False."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], rows)
    native_cuda.call(
        "fuselora_cuda_matmul_4bit",
        x.device,
        *map(native.pointer, (y, x, data, absmax, code, absmax2, code2, offset, bias)),
        *(x.shape[0], rows, cols, blocksize, blocksize2, native.DTYPE[x.dtype]),
    )
    return y


def matmul_refusal(
    x: Tensor, data: Tensor, absmax: Tensor, code: Tensor, absmax2: Tensor | None, code2: Tensor | None,
    offset: Tensor | None, blocksize: int, blocksize2: int, rows: int, cols: int, bias: Tensor | None, transpose: bool,
) -> str | None:  # fmt: skip
    """Why ``matmul_4bit`` can't take these arguments, or None."""
    if transpose or x.shape[0] > MAX_ROWS:
        return f"the CUDA product is x W^T for at most {MAX_ROWS} rows of x"
    if x.dtype not in (torch.bfloat16, torch.float16) or code.dtype != torch.float32:
        return f"the CUDA product takes bf16 and fp16 with an fp32 code, not {x.dtype} and {code.dtype}"
    if cols % CHUNK or blocksize < CHUNK or blocksize2 & (blocksize2 - 1):
        return f"K = {cols} and blocks of {blocksize} and {blocksize2} don't fit chunks of {CHUNK}"
    if x.data_ptr() % 16 or data.data_ptr() % 8 or (bias is not None and not bias.is_contiguous()):
        return "x, the data or the bias is not laid out for 16-byte loads"
    if reason := native_cuda.unsupported(data, x.dtype):
        return reason
    return "below compute capability 8.0" if capability(x.device) < 80 else None
