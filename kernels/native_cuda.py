"""The native CUDA library, as native.py is the CPU one: loaded on first use, one table of ctypes signatures.

CMake builds it where nvcc works. It links the CUDA runtime, which looks for the driver at the first call, so it loads
anywhere; ``unsupported`` says why it can't run on a device: no library, no machine code for it, too old a driver.
"""

from __future__ import annotations

import functools
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from typing import Any

import torch

from . import native

LIBRARY = native.LIBRARY.with_name("libfuselora_cuda.so")

# name: (result, arguments), in the header's order. Those whose last argument is a stream are called through ``call``.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fuselora_cuda_abi_version": (c_int32, ()),
    "fuselora_cuda_last_error": (c_char_p, ()),
    "fuselora_cuda_check": (c_int32, ()),
    "fuselora_cuda_dequantize_4bit": (
        c_int32,
        (
            *(c_void_p, c_void_p, c_void_p, c_void_p),  # out, data, absmax, code
            *(c_void_p, c_void_p, c_void_p),  # absmax2, code2, offset
            *(c_int64, c_int64, c_int64),  # n, blocksize, blocksize2
            *(c_int32, c_void_p),  # dtype, stream
        ),
    ),
    "fuselora_cuda_matmul_4bit": (
        c_int32,
        (
            *(c_void_p, c_void_p),  # y, x
            *(c_void_p, c_void_p, c_void_p),  # data, absmax, code
            *(c_void_p, c_void_p, c_void_p),  # absmax2, code2, offset
            c_void_p,  # bias
            *(c_int64, c_int64, c_int64),  # m, rows, cols
            *(c_int64, c_int64),  # blocksize, blocksize2
            *(c_int32, c_void_p),  # dtype, stream
        ),
    ),
}


@functools.cache
def _load() -> native.Loaded:
    remedy = "reinstall fuselora where nvcc is found (in a checkout: make native)"
    return native.open_library(LIBRARY, SIGNATURES, "fuselora_cuda_abi_version", remedy)


def reason() -> str | None:
    """None when the library is there, else why not and the remedy."""
    return _load()[1]


@functools.cache
def device_reason(index: int) -> str | None:
    """None when the library's kernels run on CUDA device ``index``, else why not."""
    library, why = _load()
    if library is None:
        return why
    with torch.cuda.device(index):
        return None if library.fuselora_cuda_check() == 0 else library.fuselora_cuda_last_error().decode()


def unsupported(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels can't run where ``tensor`` is and compute in ``dtype``, or None."""
    if dtype not in native.DTYPE:
        return f"native CUDA ops compute fp32, bf16 and fp16, not {dtype}"
    if tensor.device.type != "cuda":
        return reason() or f"the tensors are on {tensor.device}"
    return device_reason(tensor.get_device())


def call(name: str, device: torch.device, *args: Any) -> None:
    """Call a function on ``device`` and its current stream, the last argument; a failure raises RuntimeError."""
    library, why = _load()
    if library is None:
        raise RuntimeError(why)
    with torch.cuda.device(device):
        status = getattr(library, name)(*args, torch.cuda.current_stream().cuda_stream)
    if status != 0:
        raise RuntimeError(library.fuselora_cuda_last_error().decode())


def state() -> str:
    """One line for the environment report."""
    if (why := reason()) is not None:
        return why
    devices = (f"cuda:{i}: {device_reason(i) or 'runs'}" for i in range(torch.cuda.device_count()))
    return "; ".join((f"loaded, ABI {native.ABI_VERSION}", *devices))
