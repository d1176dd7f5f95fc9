"""The native CPU library: loaded on first use, called through one table of ctypes signatures.

``csrc/include/fuselora.h`` is the contract. CMake puts the library into ``fuselora/_lib``; it links libgomp by its
plain name, so loaded after torch it shares torch's OpenMP runtime and thread pool.

Without the library everything imports and runs: ``reason()`` says what is missing and how to get it, the ops stay on
their references, and only a direct call raises. FUSELORA_CPU_ISA=scalar|avx2|avx512|avx512_bf16|amx forces an
instruction set; one that this CPU does not have raises. AMX also takes the kernel's permission for tile registers;
where it is refused the next lower set runs and ``isa_note()`` says so. Builds for tests have ``amx_emulated`` besides:
the code for AMX on tiles in plain C++ (csrc/cpu/amx.h).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

ABI_VERSION = 1
ENV_ISA = "FUSELORA_CPU_ISA"
# Not resolved: fuselora/kernels is a symlink in a checkout, and the library lies beside the link.
LIBRARY = Path(__file__).parent.parent / "_lib" / "libfuselora_cpu.so"

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NORM_MODE = {"llama": 0, "gemma": 1, "none": 2}
ACTIVATION = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

# name: (result, arguments), in the header's order. Functions that return a status are called through ``call``.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fuselora_abi_version": (c_int32, ()),
    "fuselora_last_error": (c_char_p, ()),
    "fuselora_cpu_isa": (c_char_p, ()),
    "fuselora_cpu_isa_note": (c_char_p, ()),
    "fuselora_rms_norm": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # y, h, rstd
            *(c_void_p, c_void_p, c_void_p),  # x, residual, weight
            *(c_int64, c_int64),  # rows, cols
            *(c_int32, c_int32),  # dtype, weight_dtype
            *(c_double, c_int32, c_int32),  # eps, mode, threads
        ),
    ),
    "fuselora_rms_norm_bwd": (
        c_int32,
        (
            *(c_void_p, c_void_p),  # dx, dw
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # dy, dh, h, weight, rstd
            *(c_int64, c_int64),  # rows, cols
            *(c_int32, c_int32, c_int32),  # dy_dtype, dtype, weight_dtype
            *(c_int32, c_int32),  # mode, threads
        ),
    ),
    "fuselora_layer_norm": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # y, mean, rstd
            *(c_void_p, c_void_p, c_void_p),  # x, weight, bias
            *(c_int64, c_int64),  # rows, cols
            *(c_int32, c_int32, c_int32),  # dtype, weight_dtype, bias_dtype
            *(c_double, c_int32),  # eps, threads
        ),
    ),
    "fuselora_layer_norm_bwd": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # dx, dw, db
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # dy, x, weight, mean, rstd
            *(c_int64, c_int64),  # rows, cols
            *(c_int32, c_int32, c_int32),  # dtype, weight_dtype, threads
        ),
    ),
    "fuselora_dropout": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_int64, c_int32),  # y, x, n, dtype
            *(c_uint64, c_uint32, c_float, c_int32),  # seed, threshold, scale, threads
        ),
    ),
    "fuselora_adamw": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # norm, params, grads, low
            *(c_void_p, c_void_p, c_int64),  # sizes, offsets, count
            *(c_void_p, c_void_p, c_void_p),  # exp_avg, exp_avg_sq, steps
            *(c_void_p, c_void_p),  # lrs, decays
            *(c_double, c_double, c_double, c_double, c_void_p),  # beta1, beta2, eps, max_norm, inv_scale
            *(c_int32, c_int32, c_int32),  # dtype, low_dtype, threads
        ),
    ),
    "fuselora_glu": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # h, gate, up
            *(c_int64, c_int64),  # rows, cols
            *(c_int64, c_int64),  # gate_stride, up_stride
            *(c_int32, c_int32, c_int32),  # dtype, act, threads
        ),
    ),
    "fuselora_glu_bwd": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # dgate, dup, h
            *(c_void_p, c_void_p, c_void_p),  # dh, gate, up
            *(c_int64, c_int64),  # rows, cols
            *(c_int64, c_int64, c_int64, c_int64),  # d_stride, dh_stride, gate_stride, up_stride
            *(c_int32, c_int32, c_int32),  # dtype, act, threads
        ),
    ),
    "fuselora_rope": (
        c_int32,
        (
            *(c_void_p, c_void_p),  # y_q, y_k
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # q, k, cos, sin
            *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int64),  # batch, length, heads_q, heads_k, width, rotary
            *(POINTER(c_int64), c_int64),  # strides, table_batch_stride
            *(c_int32, c_int32),  # dtype, table_dtype
            *(c_int32, c_int32, c_int32),  # interleaved, adjoint, threads
        ),
    ),
    "fuselora_cross_entropy": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # loss, lse, entropy, dx
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # x, labels, upstream, dentropy
            *(c_int64, c_int64),  # rows, cols
            *(c_int64, c_int64, c_int32),  # dx_stride, x_stride, dtype
            *(c_int64, c_double, c_double, c_double, c_double),  # ignore_index, softcap, label_smoothing, ...
            c_int32,  # threads
        ),
    ),
    "fuselora_dequantize_4bit": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # out, data, absmax, code
            *(c_void_p, c_void_p, c_void_p),  # absmax2, code2, offset
            *(c_int64, c_int64, c_int64),  # n, blocksize, blocksize2
            *(c_int32, c_int32),  # dtype, threads
        ),
    ),
    "fuselora_quantize_4bit": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # data, absmax, w
            *(c_void_p, c_void_p),  # bounds, order
            *(c_int64, c_int64),  # n, blocksize
            *(c_int32, c_int32),  # dtype, threads
        ),
    ),
    "fuselora_quantize_absmax": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # codes, absmax2, absmax
            *(c_void_p, c_void_p),  # offset, bounds
            *(c_int64, c_int64, c_int32),  # n, blocksize2, threads
        ),
    ),
    "fuselora_gemm": (
        c_int32,
        (
            *(c_void_p, c_int64, c_int64, c_int32),  # out, out_row, out_col, out_dtype
            *(c_int64, c_int64),  # m, n
            *(c_void_p, c_int32),  # terms, count
            *(c_void_p, c_double, c_int32, c_int32),  # bias, alpha, dtype, threads
        ),
    ),
    "fuselora_attention": (
        c_int32,
        (
            *(c_void_p, c_void_p),  # out, lse
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # q, k, v, ranges
            *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int64),  # batch, heads, kv_heads, length, keys, width
            *(POINTER(c_int64), c_int32),  # strides, dtype
            *(c_double, c_int32, c_int64, c_double, c_int32),  # scale, causal, window, softcap, threads
        ),
    ),
    "fuselora_attention_bwd": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p),  # dq, dk, dv
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # dout, q, k, v, out, lse, ranges
            *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int64),  # batch, heads, kv_heads, length, keys, width
            *(POINTER(c_int64), c_int32),  # strides, dtype
            *(c_double, c_int32, c_int64, c_double, c_int32),  # scale, causal, window, softcap, threads
        ),
    ),
    "fuselora_philox": (None, (POINTER(c_uint32), POINTER(c_uint32), POINTER(c_uint32))),  # out, counter, key
}


Loaded = tuple[ctypes.CDLL | None, str | None]


def open_library(path: Path, signatures: dict[str, tuple[Any, tuple[Any, ...]]], version: str, remedy: str) -> Loaded:
    """(library, None), or (None, the sentence that says why there is none). ``version`` names the function that gives
    the library's ABI version."""
    if not path.exists():
        return None, f"native ops: expected {path.name} in {path.parent}, got no such file; {remedy}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"native ops: {path.name} does not load: {error}; {remedy}"
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            return None, f"native ops: expected {name} in {path}, got a library without it; {remedy}"
        function.restype, function.argtypes = result, arguments
    found = getattr(library, version)()
    if found != ABI_VERSION:
        return None, f"native ops: expected ABI version {ABI_VERSION} of {path}, got {found}; {remedy}"
    return library, None


@functools.cache
def _load() -> Loaded:
    remedy = "reinstall fuselora where a C++17 compiler is found (in a checkout: make native)"
    library, why = open_library(LIBRARY, SIGNATURES, "fuselora_abi_version", remedy)
    if library is not None and library.fuselora_cpu_isa() is None:
        raise RuntimeError(library.fuselora_last_error().decode())
    return library, why


def reason() -> str | None:
    """None when native ops can run, else why not and the remedy. RuntimeError: FUSELORA_CPU_ISA can't be had."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError with ``reason()`` when there is none."""
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(why)
    return loaded


def isa() -> str:
    """The instruction set that the native CPU ops run with: scalar, avx2, avx512, avx512_bf16, amx or amx_emulated."""
    return library().fuselora_cpu_isa().decode()


def isa_note() -> str | None:
    """Why a better set than ``isa()``, which this CPU has, can't be used, or None."""
    return library().fuselora_cpu_isa_note().decode() or None


def call(name: str, *args: Any) -> None:
    """Call a function that returns a status; a failure raises RuntimeError with the library's sentence."""
    loaded = library()
    if getattr(loaded, name)(*args) != 0:
        raise RuntimeError(loaded.fuselora_last_error().decode())


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def unsupported(*tensors: torch.Tensor | None) -> str | None:
    """Why the native CPU ops can't take these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPE:
            return f"native CPU ops compute fp32, bf16 and fp16, not {tensor.dtype}"
    return reason()
