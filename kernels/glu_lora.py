"""Backward of the gated activation between LoRA linears, with those adapters' gradients that need its values.

    dgate, dup, h as in glu.py, and from the tiles while they are in registers

    dA_down = dS_down^T h                  [r, I]
    dB_gate = c_gate dgate^T S_gate        [I, r]
    dB_up   = c_up dup^T S_up              [I, r]

h is never written. Apart, the GLU's backward moves 6 n bytes with h (n = M I b), dA_down reads h again, and the kernel
of dS and dB for gate and up reads 2 n and leaves a quarter of that in partial sums: 9.5 n. Here 5 n, and dS alone reads
2 n: 7 n. What is left on top is the partial sums of the splits, 8 SPLITS r I bytes per gradient.

Shapes: dh, gate, up [M, I]; factors (dS_down, S_gate, S_up) [M, r] each, None where that gradient is not needed;
adapters (A_down, B_gate, B_up) give shape and dtype of the gradients; scalings (1, c_gate, c_up).
Saved: nothing. Numerics: dgate, dup and h are rounded to their dtype first, as if they had been written, then summed in
fp32; gradients are scaled in fp32 and rounded once to their adapter's dtype. No atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import glu
from .gpu.launch import lazy, refusal
from .lora import Projection, adapters
from .registry import Cost, Sample, define, implement

MAX_RANK = 32  # three accumulators [I-slice, r] stay in registers
MIN_ROWS = 512  # below, a launch costs what the bytes would save


def _shape(grad: int, factor: Tensor, width: int) -> tuple[int, int]:
    return (factor.shape[1], width) if grad == 0 else (width, factor.shape[1])


@torch.no_grad()
def _reference(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    act: str,
    factors: Sequence[Tensor | None],
    adapters: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dgate, dup, h = glu._reference_bwd(dh, gate, up, act, factors[0] is not None)
    grads = []
    for i, (value, factor, adapter, scaling) in enumerate(
        zip((h, dgate, dup), factors, adapters, scalings, strict=True)
    ):
        if factor is None or adapter is None:
            grads.append(gate.new_empty(0))
            continue
        grad = torch.mm(factor.t(), value) if i == 0 else torch.mm(value.t(), factor)
        grads.append(grad.to(adapter.dtype) * scaling)
    return dgate, dup, grads


def _fake(dh, gate, up, act, factors, adapters, scalings):
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    grads = [
        gate.new_empty(0) if f is None else a.new_empty(_shape(i, f, gate.shape[1]))
        for i, (f, a) in enumerate(zip(factors, adapters, strict=True))
    ]
    return dgate, dup, grads


def _sample(
    m: int, width: int, ranks: Sequence[int], act: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device
) -> tuple:
    def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    s = rand(m, sum(ranks))
    factors = [part if part.shape[1] else None for part in s.split(list(ranks), 1)]
    adapters = [None if f is None else rand(*_shape(i, f, width), dtype=adapter_dtype) for i, f in enumerate(factors)]
    return rand(m, width), rand(m, width), rand(m, width), act, factors, adapters, [1.0, 2.0, 0.5]


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, width, ranks, act in (
        (1, 264, (4, 4, 4), "silu"),  # one row: a rounding of dgate or dup is shared by r numbers
        (33, 130, (7, 16, 1), "gelu_tanh"),
        (70, 40, (32, 0, 3), "gelu"),
        (5, 24, (0, 8, 0), "silu"),
        (0, 16, (4, 4, 4), "silu"),
    ):
        yield Sample(f"{m}x{width}-{ranks}", _sample(m, width, ranks, act, dtype, torch.float32, device))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for m, width, rank in ((4096, 14336, 16), (4096, 3072, 16), (2048, 14336, 32), (1001, 1552, 7)):
        yield Sample(f"{m}x{width}-r{rank}", _sample(m, width, (rank,) * 3, "silu", dtype, dtype, device))


def splits(m: int, width: int) -> int:
    """Parts of the rows: 512 programs of 128 columns, each with at least 512 rows."""
    return max(1, min(8, -(-512 // -(-width // 128)), m // 512))


def _cost(dh: Tensor, gate: Tensor, up: Tensor, act: str, factors, adapters, scalings) -> Cost:
    present = [t for t in (*factors, *adapters) if t is not None]
    ranks = sum(f.shape[1] for f in factors if f is not None)
    parts = splits(*gate.shape)
    partial = 2 * 4 * parts * gate.shape[1] * ranks
    moved = 5 * dh.numel() * dh.element_size() + sum(t.numel() * t.element_size() for t in present) + partial
    return Cost(moved, (12 + 2 * ranks) * dh.numel())


GLU_BWD_LORA = define(
    "glu_bwd_lora(Tensor dh, Tensor gate, Tensor up, str act, Tensor?[] factors, Tensor?[] adapters,"
    " float[] scalings) -> (Tensor dgate, Tensor dup, Tensor[] grads)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    workloads=_workloads,
    cost=_cost,
    long_reduction=True,
)


def _triton_supports(dh: Tensor, gate: Tensor, up: Tensor, act: str, factors, adapters, scalings) -> str | None:
    if any(f is not None and f.shape[1] > MAX_RANK for f in factors):
        return f"an adapter's rank is above {MAX_RANK}"
    return refusal(dh, gate, up, *factors, *adapters, dot=True)


def pays(outs: Sequence[Tensor], inputs: Sequence[Projection], down: Projection, need_down: Projection) -> bool:
    """Whether the backward of an MLP block should use this op: a GPU kernel takes it, and its bytes are the fewer."""
    loras = [adapters(p.lora) for p in (*inputs, down)]
    if len(outs) != 2 or not outs[0].is_cuda or outs[0].shape[0] < MIN_ROWS or need_down.weight:
        return False
    plain = all(len(own) <= 1 and all(one.a.shape[0] <= MAX_RANK for one in own) for own in loras)
    return any(loras) and plain and all(one.p == 0.0 for one in loras[-1]) and refusal(*outs, dot=True) is None


implement(GLU_BWD_LORA, "triton", lazy("glu_lora", "glu_bwd_lora"), _triton_supports)
