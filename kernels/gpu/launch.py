"""Where Triton kernels run, and the one function that launches them.

A launcher computes grid, block sizes and warps as a pure function of shapes, dtypes and ``capability(device)``, and
calls ``launch``. Three things can then happen:

* on a CUDA device the kernel runs;
* with TRITON_INTERPRET=1 (set before Triton is imported) it runs on CPU tensors, program by program, in numpy;
* inside ``record`` nothing runs: launchers are given ``device="meta"`` tensors of any size and what they would have
  launched is collected, so that tests can compile exactly those kernels for every architecture ahead of time, add up
  the bytes behind their pointers and count launches, all without a GPU.

Triton is imported at the first launch: it takes half a second, and is not there on every platform.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ENV_INTERPRET = "TRITON_INTERPRET"
INTERPRETED_CAPABILITY, INTERPRETED_SMS = 90, 4  # few multiprocessors: persistent kernels loop in the interpreter too


@dataclass(frozen=True)
class Launch:
    """One recorded launch: ``args`` by parameter name, tensors on the meta device; ``options`` as num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Recorder:
    capability: int
    sms: int
    launches: list[Launch] = field(default_factory=list)


_recorder: Recorder | None = None


@contextlib.contextmanager
def record(capability: int = 90, sms: int = 132) -> Iterator[list[Launch]]:
    """Collect launches on meta tensors instead of running them, as on a device of this compute capability."""
    global _recorder
    previous, _recorder = _recorder, Recorder(capability, sms)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def interpreting() -> bool:
    return os.environ.get(ENV_INTERPRET) == "1"


def lazy(module: str, name: str) -> Callable[..., Any]:
    """``kernels/gpu/<module>.py``'s launcher ``name``, imported at its first call."""

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".{module}", __package__), name)

    def call(*args: Any) -> Any:
        return launcher()(*args)

    call.__name__ = name
    return call


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"


def refusal(*tensors: Tensor | None, dot: bool = False) -> str | None:
    """Why Triton kernels cannot take these tensors, or None. ``dot``: the kernel multiplies matrices."""
    if reason := _missing():
        return reason
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{t.dtype} has no Triton kernel"
        if t.is_cuda:  # asked first: looking into the environment would cost 1.2 us per tensor
            pass
        elif t.is_cpu and interpreting():
            if t.dtype == torch.bfloat16:
                return "Triton's interpreter truncates bfloat16"
        elif not (_recorder and t.is_meta):
            return f"the tensors are on {t.device}"
        if dot and t.dtype != torch.float32 and capability(t.device) < 80:
            return "below sm_80 Triton multiplies matrices without tensor cores"  # 3.6.0 and 3.7.1: FFMA, bf16 and fp16
    return None


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def capability(device: torch.device) -> int:
    """The compute capability times ten: 90 on Hopper."""
    if _recorder is not None:
        return _recorder.capability
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    properties = _properties(torch.cuda.current_device() if device.index is None else device.index)
    return properties.major * 10 + properties.minor


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors, for grids that fill the device once."""
    if _recorder is not None:
        return _recorder.sms
    if device.type != "cuda":
        return INTERPRETED_SMS
    return _properties(torch.cuda.current_device() if device.index is None else device.index).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, options: dict[str, Any], **constants: Any) -> None:
    """Run ``kernel[grid](*args, **constants, **options)`` on the device of its first tensor; nothing for an empty grid.

    ``args`` are tensors (or None) and run-time numbers in the order of the kernel's parameters, ``constants`` its
    ``tl.constexpr`` parameters, ``options`` num_warps, num_stages and the like.
    """
    if 0 in grid:
        return
    if _recorder is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        bound = dict(zip(names, args, strict=True)) | constants
        _recorder.launches.append(Launch(kernel, grid, bound, options))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)
