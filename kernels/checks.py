"""Argument checks shared by the public functions and the fakes. Every message says op, what was expected, what came,
and what to do. Launchers behind the ops only assert.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, what: str, expected: object, got: object, remedy: str) -> ValueError:
    """The error sentence used throughout; the caller raises it."""
    return ValueError(f"{op}: {what}: expected {expected}, got {got}; {remedy}")


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise fail(op, f"{name}.dtype", "fp32, bf16, fp16 or fp64", tensor.dtype, f"cast {name} first")


def check_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    """A float tensor whose last dimension is that of features."""
    check_float(op, name, tensor)
    if tensor.dim() == 0:
        raise fail(op, f"{name}.dim()", "at least 1", "0 (shape ())", f"reshape {name}")


def check_dim(op: str, name: str, tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.dim() == 0 or tensor.shape[dim] != size:
        raise fail(op, f"{name}.shape[{dim}]", size, tuple(tensor.shape), f"pass a {name} that fits")


def check_ndim(op: str, name: str, tensor: torch.Tensor, ndim: int) -> None:
    if tensor.dim() != ndim:
        raise fail(op, f"{name}.dim()", ndim, f"{tensor.dim()} (shape {tuple(tensor.shape)})", f"reshape {name}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    if len({t.device for t in tensors.values() if t is not None}) > 1:
        present = {name: t.device for name, t in tensors.items() if t is not None}
        listed = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise fail(op, "devices", "one device for all tensors", listed, "move them together")


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise fail(op, name, "one of " + ", ".join(map(repr, choices)), repr(value), "choose one of those")


def check_range(op: str, name: str, value: float, low: float, high: float) -> None:
    """``low <= value < high``."""
    if not low <= value < high:
        raise fail(op, name, f"{low} <= {name} < {high}", value, "choose a value in that range")
