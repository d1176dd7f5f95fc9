"""DoRA's ops: the row norms of the adapted weight, and the column scale that they lead to with its backward.

    norm_n = || W_n + s (B A)_n ||_2            over the K inputs of output n           ``dora_norm``
    y      = u * scale + bias + base            scale, bias per column                  ``dora_scale``
    du     = dy * scale,  dscale_n = sum_m dy_mn u_mn                                   ``dora_scale_bwd``

Shapes: W [N, K], A [r, K], B [N, r], norm, scale, bias, dscale [N], u, base, y, dy, du [M, N].

W + s B A is never in memory: a block of rows, or a tile in registers, of it is made, squared and summed. The identity
sum_k W^2 + 2 s (W A^T) . B + s^2 B (A A^T) B^T would save nothing, for it reads W as often and needs as many products,
and it loses every digit where s B A opposes W: its terms are of the size of |W|^2 whatever is left of them.

Bytes, elements of b bytes: norm N K b; scale 2 M N b (3 with base); its backward 3 M N b.
Numerics: fp32 throughout (fp64 with fp64 tensors), adapters unrounded, one rounding of y and du at the end; norm and
dscale stay fp32. No atomics: same inputs give the same bits.
Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import load, multiply, row_blocks, scratch_blocks
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, implement


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor has it, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    dtype = wide_dtype(weight, a, b)
    norm = torch.empty(weight.shape[0], dtype=dtype, device=weight.device)
    a = a.to(dtype)
    for block in row_blocks(weight.shape[0], weight.shape[1], weight.device):
        adapted = torch.addmm(weight[block].to(dtype), b[block].to(dtype), a, alpha=scaling)
        norm[block] = torch.linalg.vector_norm(adapted, dim=1)
    return norm


def _scale(u: Tensor, scale: Tensor, bias: Tensor | None, base: Tensor | None) -> Tensor:
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    for block, (buffer,) in scratch_blocks(u, 1):
        out = torch.mul(u[block], scale, out=buffer)
        for term in (bias, None if base is None else base[block]):
            if term is not None:
                out += term
        y[block] = out
    return y


def _scale_bwd(dy: Tensor, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    du = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    dscale = torch.zeros_like(scale)
    for block, (buffer, product) in scratch_blocks(dy, 2):
        dyf = load(dy[block], buffer)
        multiply(dyf, scale, out=du[block], scratch=product)
        dscale += torch.mul(dyf, u[block], out=product).sum(0)
    return du, dscale


def _rand(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _adapted(dtype: torch.dtype, device: torch.device, n: int, k: int, r: int, low: torch.dtype) -> tuple[Tensor, ...]:
    return _rand(dtype, device, n, k), _rand(low, device, r, k), _rand(low, device, n, r)


def _norm_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for n, k, r in ((1, 8, 1), (7, 24, 4), (5, 130, 7), (70, 200, 8), (33, 72, 80), (0, 8, 4)):
        for low in {dtype, torch.float32}:
            weight, a, b = _adapted(dtype, device, n, k, r, low)
            yield Sample(f"{n}x{k}x{r}-{low}", (weight, a, b, 0.5))
    weight, a, b = _adapted(dtype, device, 24, 20, 4, dtype)
    yield Sample("transposed", (weight.t(), a.t()[:4].repeat(1, 6)[:, :24].contiguous(), b[:20], 2.0))


def _scale_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, n in ((1, 8), (5, 30), (33, 257), (0, 8)):
        u, scale, bias = _rand(dtype, device, m, n), _rand(_wide(dtype), device, n), _rand(dtype, device, n)
        yield Sample(f"{m}x{n}", (u, scale, None, None))
        yield Sample(f"{m}x{n}-bias", (u, scale, bias, None))
        yield Sample(f"{m}x{n}-base", (u, scale, None, torch.randn_like(u)))
    scale, bias = _rand(_wide(dtype), device, 24), _rand(torch.float32, device, 24)
    columns, rows = _rand(dtype, device, 24, 9).t(), _rand(dtype, device, 9, 48)[:, :24]
    yield Sample("strided", (columns, scale, bias, rows))


def _bwd_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, n in ((1, 8), (5, 30), (300, 40), (33, 257), (0, 8)):
        u, dy, scale = _rand(dtype, device, m, n), _rand(dtype, device, m, n), _rand(_wide(dtype), device, n)
        yield Sample(f"{m}x{n}", (dy, u, scale))
    scale, u = _rand(_wide(dtype), device, 24), _rand(dtype, device, 9, 48)[:, :24]
    yield Sample("zero-stride", (_rand(dtype, device, 1, 1).expand(9, 24), u, scale))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


WEIGHTS = ((4096, 4096, 16), (1024, 4096, 16), (14336, 4096, 16), (1024, 3072, 64), (1008, 1531, 7))


def _norm_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Llama-3-8B's q, k and gate with PEFT's fp32 adapters and with adapters of the weight's dtype; Qwen3-0.6B's down;
    an awkward one."""
    for n, k, r in WEIGHTS:
        for low in dict.fromkeys((torch.float32, dtype)):
            yield Sample(f"{n}x{k}x{r}-{low}", (*_adapted(dtype, device, n, k, r, low), 2.0))


def _scale_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """4096 tokens of Llama-3-8B's q, k and gate; an awkward size with a bias."""
    for m, n, bias in ((4096, 4096, False), (4096, 1024, False), (4096, 14336, True), (1003, 1504, True)):
        u, scale = _rand(dtype, device, m, n), _rand(torch.float32, device, n)
        yield Sample(f"{m}x{n}", (u, scale, _rand(dtype, device, n) if bias else None, None))
    u, base = _rand(dtype, device, 4096, 4096), _rand(dtype, device, 4096, 4096)
    yield Sample("4096x4096-base", (u, _rand(torch.float32, device, 4096), None, base))


def _bwd_workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, n in ((4096, 4096), (4096, 1024), (4096, 14336), (1003, 1504)):
        u = _rand(dtype, device, m, n)
        yield Sample(f"{m}x{n}", (torch.empty_like(u), u, _rand(torch.float32, device, n)))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


DORA_NORM = define(
    "dora_norm(Tensor weight, Tensor a, Tensor b, float scaling) -> Tensor",
    reference=_norm,
    fake=lambda weight, a, b, scaling: weight.new_empty(weight.shape[0], dtype=wide_dtype(weight, a, b)),
    samples=_norm_samples,
    cost=lambda weight, a, b, scaling: Cost(
        _bytes(weight, a, b) + 4 * weight.shape[0], weight.numel() * (2 * a.shape[0] + 4)
    ),
    long_reduction=True,
    workloads=_norm_workloads,
)
DORA_SCALE = define(
    "dora_scale(Tensor u, Tensor scale, Tensor? bias, Tensor? base) -> Tensor",
    reference=_scale,
    fake=lambda u, scale, bias, base: torch.empty(u.shape, dtype=u.dtype, device=u.device),
    samples=_scale_samples,
    cost=lambda u, scale, bias, base: Cost(2 * _bytes(u) + _bytes(scale, bias, base), 3 * u.numel()),
    workloads=_scale_workloads,
)
DORA_SCALE_BWD = define(
    "dora_scale_bwd(Tensor dy, Tensor u, Tensor scale) -> (Tensor du, Tensor dscale)",
    reference=_scale_bwd,
    fake=lambda dy, u, scale: (torch.empty(dy.shape, dtype=dy.dtype, device=dy.device), torch.empty_like(scale)),
    samples=_bwd_samples,
    cost=lambda dy, u, scale: Cost(3 * _bytes(u) + 2 * _bytes(scale), 3 * u.numel()),
    long_reduction=True,
    workloads=_bwd_workloads,
)


def _triton_norm_supports(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> str | None:
    return refusal(weight) or refusal(a, b, dot=True)


implement(DORA_NORM, "triton", lazy("dora", "dora_norm"), _triton_norm_supports)
implement(DORA_SCALE, "triton", lazy("dora", "dora_scale"), refusal)
implement(DORA_SCALE_BWD, "triton", lazy("dora", "dora_scale_bwd"), refusal)
