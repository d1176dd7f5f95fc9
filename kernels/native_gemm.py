"""Products on the CPU with few right operands, one rounding and no temporary: ``fuselora_gemm`` called on tensors.

    out = alpha * sum_t A_t B_t + bias        A_t [M, k_t], B_t [k_t, N], out [M, N]

A term's B is a linear's weight [N, k] (``by_rows`` false), a matrix [k, N] as it lies (true), a 4-bit weight either way
round, or an adapter times a scale: rounded to the product's dtype, or what that rounding left, so that fp32 adapters
enter bf16 products in two parts without a copy of them (lora.py). So a projection with its adapters, or an input
gradient of several projections with theirs, is one product: fp32 sums over all terms.

Bytes: every operand once, half a byte per 4-bit weight, and the panels, which stay in the L2 cache (csrc/cpu/gemm.cpp).
Numerics: fp32 accumulation over ascending k in segments, then over these; weights and adapters rounded to the
dtype of A. The same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

# The fields of fuselora_gemm_term and fuselora_weight_4bit (csrc/include/fuselora.h): packing bytes takes 1 us, filling
# ctypes structures several.
TERM = struct.Struct("=QqqQQqdiiii")
WEIGHT_4BIT = struct.Struct("=QQQQQQqq")


class Term(NamedTuple):
    """A [M, k] and B, both with contiguous rows. B is ``data`` [N, k] or, ``by_rows``, [k, N]; or the 4-bit weight of
    ``quantized``, the operands of the 4-bit ops (nf4.py): data, absmax, code, absmax2, code2, offset, sizes."""

    a: Tensor
    data: Tensor | None
    by_rows: bool = False
    scale: float = 1.0
    rest: bool = False
    quantized: tuple | None = None


def rows_of(t: Tensor) -> Tensor:
    """t, or a copy, with contiguous rows."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def adapter_terms(a: Tensor, adapter: Tensor, by_rows: bool, scale: float, split: bool) -> list[Term]:
    """One term, or for a split adapter two: its rounded part, and the rest."""
    adapter = rows_of(adapter)
    rounded = Term(a, adapter, by_rows, scale)
    return [rounded, Term(a, adapter, by_rows, scale, True)] if split else [rounded]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _pack(terms: Sequence[Term]) -> tuple[bytes, list[ctypes.Array]]:
    """The terms as the library reads them, and the 4-bit weights that they point to."""
    packed, weights = [], []
    for a, matrix, by_rows, scale, rest, quantized in terms:
        if quantized is None:
            assert matrix is not None
            data, place, stride, dtype = matrix.data_ptr(), 0, matrix.stride(0), native.DTYPE[matrix.dtype]
        else:
            *tensors, blocksize, blocksize2, _, stride = quantized
            weights.append(ctypes.create_string_buffer(WEIGHT_4BIT.size))
            WEIGHT_4BIT.pack_into(weights[-1], 0, *map(_address, tensors), blocksize, blocksize2)
            data, place, dtype = 0, ctypes.addressof(weights[-1]), 0
        left = a.data_ptr(), a.stride(0), a.shape[1]
        packed.append(TERM.pack(*left, data, place, stride, scale, dtype, by_rows, rest, 0))
    return b"".join(packed), weights


def gemm(
    terms: Sequence[Term],
    n: int,
    *,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """The product [M, N], or ``transposed`` [N, M], of ``dtype`` (default: that of the A's), or into ``out``
    [M, N] with contiguous rows. At least one term; a sum of no depth is the bias, or zero."""
    m, like = terms[0].a.shape[0], terms[0].a
    if out is None:
        out = like.new_empty((n, m) if transposed else (m, n), dtype=dtype)
    terms = [t for t in terms if t.a.shape[1]]
    if not out.numel():
        return out
    if not terms:
        return out.zero_() if bias is None else out.copy_(bias)
    strides = (1, m) if transposed else (out.stride(0), 1)
    packed, weights = _pack(terms)  # weights: kept alive during the call
    native.call(
        "fuselora_gemm", out.data_ptr(), *strides, native.DTYPE[out.dtype], m, n, packed, len(terms),
        native.pointer(bias), alpha, native.DTYPE[like.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


@functools.cache
def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().partition("\n\n")[0] if cpuinfo.exists() else ""


@functools.cache
def has_amx() -> bool:
    """Whether oneDNN multiplies bf16 in AMX tiles here, with which these kernels don't compete."""
    return "amx_bf16" in _cpu_flags()


# Rows from which a product of dense operands runs here; measured on a Zen 5 core, see docs/kernels.md. MKL reaches 40 %
# of an AMD core's fp32 peak; in fp16 torch has no fast product of a weight as it lies.
LEAST_ROWS = {torch.bfloat16: 64, torch.float32: 16, torch.float16: 1}


def dense_refusal(rows: int, *tensors: Tensor | None) -> str | None:
    """Why a product of dense operands with so many rows is better left to torch's library, or None."""
    if reason := native.unsupported(*tensors):
        return reason
    dtype = [t for t in tensors if t is not None][0].dtype
    if rows < LEAST_ROWS[dtype]:
        return f"{rows} rows: below {LEAST_ROWS[dtype]} torch's library is as fast"
    return library_refusal(dtype)


@functools.cache
def library_refusal(dtype: torch.dtype) -> str | None:
    """Why torch's library is the faster one in this dtype on this processor, or None; the set of instructions is
    settled when the native library is loaded."""
    isa = native.isa()
    if dtype == torch.bfloat16 and (has_amx() or isa != "avx512_bf16"):
        return "oneDNN multiplies bf16 faster with this instruction set"
    if dtype == torch.float32 and ("AuthenticAMD" not in _cpu_flags() or not isa.startswith("avx512")):
        return "MKL multiplies fp32 as fast on this processor"
    return None


def torch_product(a: Tensor, b: Tensor, out: Tensor, *, by_rows: bool = False, bias: Tensor | None = None) -> Tensor:
    """out [M, N] = a b^T + bias with b [N, k], or ``by_rows`` a b with b [k, N]."""
    right = b if by_rows else b.t()
    return torch.mm(a, right, out=out) if bias is None else torch.addmm(bias, a, right, out=out)


def product(a: Tensor, b: Tensor, out: Tensor, *, by_rows: bool = False, bias: Tensor | None = None) -> Tensor:
    """The same on CPU: here where that pays, else by torch."""
    operands = (a, b) if bias is None else (a, b, bias)
    if len({t.dtype for t in operands}) > 1 or dense_refusal(a.shape[0], *operands) is not None:
        return torch_product(a, b, out, by_rows=by_rows, bias=bias)
    term = Term(rows_of(a), rows_of(b), by_rows)
    return gemm([term], out.shape[1], bias=None if bias is None else rows_of(bias), out=out)
