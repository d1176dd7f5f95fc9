"""Launches of the LoRA GEMMs: tiles by architecture, and the argument lists of lora_gemm.py's kernels.

Kernels have three slots for projections and adapters. What a slot lacks (a bias, an adapter) is an empty tensor of the
slots' common type; slots past the last are None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..dropout import threshold
from .launch import launch
from .lora_gemm import BLOCK_R, SLOTS, Config, grad_x_kernel, project_kernel


def default_config(capability: int, dtype: torch.dtype, m: int, aligned: bool = True) -> Config:
    """Tiles that fit shared memory (99 KB on sm_86, 89 and 120, 163 KB on 80, 227 KB on 90 and 100) and
    registers without spills; measured rows of the table replace them. ``aligned``: rows start on 16 bytes."""
    if dtype == torch.float32:  # exact fp32 runs on FMA units: small tiles, no tensor cores
        return Config(64, 64, 16, 8, 4, 2)
    if not aligned:
        return Config(64, 64, 32, 8, 4, 2)
    if m <= 64:
        return Config(64, 128, 64, 8, 4, 3)
    if capability in (80, 90, 100, 103):
        return Config(128, 256, 64, 8, 8, 3)
    return Config(128, 128, 32, 8, 4, 4)


def expand_config(dtype: torch.dtype, narrow: bool = False) -> Config:
    """Tiles of the low-rank part alone, which is bound by its writes; ``narrow`` ones where masks' words or
    addresses of unaligned rows take registers."""
    return Config(32, 64, 16, 8, 4, 1) if dtype == torch.float32 else Config(64, 64 if narrow else 128, 16, 8, 4, 1)


def unit(*tensors: Tensor) -> int:
    """The UNIT of these matrices, at most 8; 1 where all are multiples of 16, which Triton sees by itself."""
    common = math.gcd(16, *[number for t in tensors for number in (t.shape[1], t.stride(0))])
    return 1 if common == 16 else common


def aligned(tensors: Sequence[Tensor], widths: Sequence[int] = ()) -> bool:
    """Whether these matrices' rows, and those of contiguous outputs of these widths, start on 16 bytes."""
    return all(n % 8 == 0 for n in widths) and all(
        t.stride(0) % 8 == 0 and t.storage_offset() * t.element_size() % 16 == 0 for t in tensors
    )


class Part(NamedTuple):
    """One adapter's two factors: S_j or dS_j [M, r], and B_j or A_j as it is kept, with what goes with it."""

    low: Tensor
    wide: Tensor
    split: bool
    scaling: float = 1.0
    seed: int = 0
    p: float = 0.0


class Slot(NamedTuple):
    """One output of a ``project_kernel`` launch."""

    y: Tensor
    weight: Tensor | None
    bias: Tensor | None
    part: Part | None


def dense(t: Tensor) -> Tensor:
    """Rows may lie anywhere, their elements side by side."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _padded(values: Sequence[Any]) -> list[Any]:
    return [*values, *[None] * (SLOTS - len(values))]


def _numbers(values: Sequence[float]) -> list[float]:
    return [*values, *[0] * (SLOTS - len(values))]


def _alike(tensors: Sequence[Tensor | None], stand_in: Tensor) -> list[Tensor]:
    """Pointers of one type: fp32 if the dtypes differ, an empty tensor where there is none."""
    kinds = {t.dtype for t in tensors if t is not None}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    empty = torch.empty(0, dtype=dtype, device=stand_in.device)
    return [empty if t is None else t.to(dtype) for t in tensors]


def launch_project(x: Tensor | None, slots: Sequence[Slot], config: Config, accumulate: bool) -> None:
    """One launch over at most SLOTS outputs; without ``x`` the low-rank part and the bias alone."""
    m, first = slots[0].y.shape[0], slots[0].y
    parts = [slot.part for slot in slots]
    widths = [slot.y.shape[1] for slot in slots]
    ranks = [0 if part is None else part.low.shape[1] for part in parts]
    lows = [first[:0] if part is None else part.low for part in parts]
    wides = _alike([None if part is None else part.wide for part in parts], first)
    biases, weights = [slot.bias for slot in slots], [slot.weight for slot in slots if slot.weight is not None]
    stride_low = next((part.low.stride(0) for part in parts if part is not None), 0)
    k = 0 if x is None else x.shape[1]
    tiles = triton.cdiv(m, config.block_m) * sum(triton.cdiv(n, config.block_n) for n in widths)
    launch(
        project_kernel,
        (tiles,),
        x,
        *_padded(weights),
        *_padded([slot.y for slot in slots]),
        *_padded(_alike(biases, first)),
        *_padded(lows),
        *_padded(wides),
        *(m, k),
        *_numbers(widths),
        *_numbers([0 if bias is None else bias.shape[0] for bias in biases]),
        *_numbers(ranks),
        *[float(scaling) for scaling in _numbers([1.0 if part is None else part.scaling for part in parts])],
        0 if x is None else x.stride(0),
        *_numbers([weight.stride(0) for weight in weights]),
        stride_low,
        *_numbers([0 if part is None else part.wide.stride(0) for part in parts]),
        options=dict(num_warps=config.warps, num_stages=config.stages),
        COUNT=len(slots),
        GEMM=x is not None,
        SPLIT=any(part is not None and part.split for part in parts),
        BIAS=any(bias is not None for bias in biases),
        ACCUMULATE=accumulate,
        EVEN_K=k % config.block_k == 0,
        UNIT=unit(*[slot.y for slot in slots], *([] if x is None else [x]), *weights),
        UNIT_R=unit(*[t for part in parts if part is not None for t in (part.low, part.wide)]),
        BLOCK_R=BLOCK_R,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
    )


def launch_grad_x(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    config: Config,
    accumulate: bool,
) -> None:
    """One launch of at most SLOTS weights and SLOTS adapters; without weights the low-rank part alone."""
    m, k = dx.shape
    widths, ranks = [dy.shape[1] for dy in dys], [part.low.shape[1] for part in parts]
    launch(
        grad_x_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),),
        dx,
        *_padded(dys),
        *_padded(weights),
        *_padded([part.low for part in parts]),
        *_padded([part.wide for part in parts]),
        *(m, k),
        *_numbers(widths),
        *_numbers(ranks),
        *_numbers([part.seed for part in parts]),
        *_numbers([threshold(part.p) for part in parts]),
        *[float(scale) for scale in _numbers([1.0 / (1.0 - part.p) for part in parts])],
        *_numbers([dy.stride(0) for dy in dys]),
        *_numbers([weight.stride(0) for weight in weights]),
        parts[0].low.stride(0) if parts else 0,
        *_numbers([part.wide.stride(0) for part in parts]),
        options=dict(num_warps=config.warps, num_stages=config.stages),
        COUNT=max(1, len(dys)),
        ADAPTERS=len(parts),
        DROPPED=sum(2**j for j, part in enumerate(parts) if part.p > 0.0),
        GEMM=bool(dys),
        SPLIT=any(part.split for part in parts),
        ACCUMULATE=accumulate,
        EVEN_N=all(n % config.block_k == 0 for n in widths),
        EVEN_K=k % config.block_n == 0,
        QUADS=k % 4 == 0,
        UNIT=unit(dx, *dys, *weights, *[part.wide for part in parts]),
        UNIT_R=unit(*[part.low for part in parts]),
        BLOCK_R=BLOCK_R,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
    )
