"""AdamW over many small tensors at once: unscale, norm, clip and update.

    g = grad * inv_scale                                    gradient scaler, 1 without
    norm = sqrt(sum over all tensors of g^2),  c = min(1, max_norm / (norm + 1e-6))
    t = steps + 1
    m = beta1 m + (1 - beta1) c g,   v = beta2 v + (1 - beta2) (c g)^2
    p = (1 - lr decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    low = p rounded to a working dtype                      only where asked for

LoRA has hundreds of small tensors (448 for a 7B model): the cost of a step is launches, not arithmetic. m and v are two
flat buffers; parameters and gradients stay where they are and are reached through a table of their addresses, so
nothing of the model moves. Every tensor has its own lr and decay (LoRA+, no decay for vectors) in the same launch.

``steps`` [number of tensors] counts updates and holds equal values, one per tensor because torch's optimizer state has
one. If any gradient is not finite nothing is updated and ``steps`` stay, as with a gradient scaler, and the returned
norm says so. Bytes, n elements of b bytes: 8nb (gradients are read twice).
Numerics: fp32 inside, each of p, m, v rounded once; m and v have the parameters' dtype, as in torch.optim.AdamW.
Deterministic: partial sums of the norm in a fixed order.
Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; clipping as torch's
``clip_grad_norm_`` computes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import native
from .gpu.launch import lazy, refusal
from .registry import Cost, Sample, define, implement
from .rms_norm import accumulator

CLIP_EPSILON = 1e-6
ALIGN = 16  # elements, where a tensor's part of the flat buffers may begin; bytes, where a tensor itself may


def offsets(params: Sequence[Tensor]) -> list[int]:
    """Where each tensor's m and v begin in the flat buffers; the last entry is their size."""
    at = [0]
    for p in params:
        at.append(at[-1] + -(-p.numel() // ALIGN) * ALIGN)
    return at


@torch.no_grad()
def _reference(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor,
    lrs: Sequence[float], decays: Sequence[float], beta1: float, beta2: float, eps: float, max_norm: float,
    inv_scale: Tensor | None, low: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    acc = accumulator(exp_avg.dtype)
    scale = torch.ones((), dtype=acc, device=exp_avg.device) if inv_scale is None else inv_scale.to(acc).reshape(())
    squares = torch.stack([g.to(acc).mul(scale).square().sum() for g in grads])
    norm = squares.sum().sqrt()
    finite = torch.isfinite(norm)
    clip = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0) * scale
    t = (steps[0] + 1).to(torch.float64)
    correction1, correction2 = (1 - beta1**t).to(acc), (1 - beta2**t).to(acc)
    for i, (p, g, at) in enumerate(zip(params, grads, offsets(params)[:-1], strict=True)):
        m, v = (flat[at : at + p.numel()].view(p.shape) for flat in (exp_avg, exp_avg_sq))
        clipped = g.to(acc) * clip
        new_m = m.to(acc).lerp(clipped, 1 - beta1)
        new_v = v.to(acc) * beta2 + (1 - beta2) * clipped.square()
        update = (lrs[i] / correction1) * new_m / ((new_v / correction2).sqrt() + eps)
        new_p = (1 - lrs[i] * decays[i]) * p.to(acc) - update
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(finite, new.to(old.dtype), old))
        if low:
            low[i].copy_(torch.where(finite, p.to(low[i].dtype), low[i]))
    steps += finite.to(steps.dtype)
    return norm


def _fake(params, grads, exp_avg, exp_avg_sq, steps, *rest) -> Tensor:
    return torch.empty((), dtype=accumulator(exp_avg.dtype), device=exp_avg.device)


SIZES = (((3, 8), (7,), (16, 33)), ((1,),), ((5, 40), (0, 4), (1030,)))


def _tensors(
    sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    params, grads = ([torch.randn(s, dtype=dtype, device=device) for s in sizes] for _ in range(2))
    exp_avg, exp_avg_sq = torch.randn(2, offsets(params)[-1], dtype=dtype, device=device).unbind()
    return params, grads, exp_avg, exp_avg_sq.square(), torch.full((len(params),), 3.0, device=device)


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for i, sizes in enumerate(SIZES):
        lrs, decays = [1e-3 * (j + 1) for j in range(len(sizes))], [0.1 * (j % 2) for j in range(len(sizes))]
        for max_norm in (1.0, 1e9):
            tensors = _tensors(sizes, dtype, device)
            yield Sample(f"{i}-clip{max_norm:g}", (*tensors, lrs, decays, 0.9, 0.999, 1e-8, max_norm, None, []))
        scale = torch.tensor(0.25, device=device)
        low = [torch.zeros(s, dtype=torch.float16, device=device) for s in sizes]
        tensors = _tensors(sizes, dtype, device)
        yield Sample(f"{i}-scaled-low", (*tensors, lrs, decays, 0.9, 0.95, 1e-6, 1.0, scale, low))


def _workloads(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    """Rank-16 adapters of the seven linears: 32 layers of Llama-3-8B, 28 of Qwen3-0.6B. PEFT keeps them in fp32."""
    llama = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
    qwen = ((1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072), (1024, 3072), (3072, 1024))
    for name, layers, linears in (("llama3-8b", 32, llama), ("qwen3-0.6b", 28, qwen)):
        sizes = [size for k, n in linears for size in ((16, k), (n, 16))] * layers
        rates, decays = [1e-4] * len(sizes), [0.0] * len(sizes)
        tensors = _tensors(sizes, torch.float32, device)
        yield Sample(name, (*tensors, rates, decays, 0.9, 0.999, 1e-8, 1.0, None, []))


def _cost(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: object) -> Cost:
    low = rest[-1]
    assert isinstance(low, (list, tuple))
    n, size = sum(p.numel() for p in params), params[0].element_size()
    return Cost(8 * n * size + sum(t.numel() * t.element_size() for t in low), 18 * n)


ADAMW = define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) steps,"
    " float[] lrs, float[] decays, float beta1, float beta2, float eps, float max_norm, Tensor? inv_scale,"
    " Tensor(e!)[] low) -> Tensor norm",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    long_reduction=True,
    workloads=_workloads,
)


def _layout(params, grads, exp_avg, low) -> str | None:
    """Why one table of addresses can't describe these tensors, or None."""
    if any(t.dtype != exp_avg.dtype for t in (*params, *grads)):
        return "parameters, gradients and moments differ in dtype"
    if any(not t.is_contiguous() for t in (*params, *grads, *low)):
        return "a parameter or gradient is not contiguous"
    if any(t.dtype != low[0].dtype for t in low):
        return "working copies differ in dtype"
    return None


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", [t.data_ptr() for t in tensors])


def _cpu(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor,
    lrs: Sequence[float], decays: Sequence[float], beta1: float, beta2: float, eps: float, max_norm: float,
    inv_scale: Tensor | None, low: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    norm = torch.empty((), dtype=torch.float32)
    scale = None if inv_scale is None else inv_scale.to(torch.float32)
    tables = (
        *map(_addresses, (params, grads, low)),
        array("q", [p.numel() for p in params]),
        array("q", offsets(params)),
        array("d", lrs),
        array("d", decays),
    )
    param, grad, copies, sizes, at, rates, rest = (table.buffer_info()[0] for table in tables)
    moments = (exp_avg.data_ptr(), exp_avg_sq.data_ptr(), steps.data_ptr())
    native.call(
        "fuselora_adamw", norm.data_ptr(), param, grad, copies if low else None, sizes, at, len(params), *moments,
        rates, rest, beta1, beta2, eps, max_norm, native.pointer(scale), native.DTYPE[exp_avg.dtype],
        native.DTYPE[low[0].dtype if low else exp_avg.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return norm


def _cpu_supports(params, grads, exp_avg, exp_avg_sq, steps, *rest) -> str | None:
    low = rest[-1]
    if not params:
        return "there are no parameters"
    if steps.dtype != torch.float32 or not all(t.is_contiguous() for t in (exp_avg, exp_avg_sq, steps)):
        return "the moments are not contiguous, or the steps not fp32"
    if exp_avg_sq.dtype != exp_avg.dtype or min(exp_avg.numel(), exp_avg_sq.numel()) < offsets(params)[-1]:
        return "the moments differ in dtype or don't hold all parameters"
    return _layout(params, grads, exp_avg, low) or native.unsupported(exp_avg, *low[:1])


def _triton_supports(params, grads, exp_avg, exp_avg_sq, steps, *rest) -> str | None:
    low = rest[-1]
    if why := _layout(params, grads, exp_avg, low):
        return why
    if exp_avg.device.type != "meta" and any(t.data_ptr() % ALIGN for t in (*params, *grads, *low)):
        return f"a parameter or gradient does not begin at a multiple of {ALIGN} bytes"
    return refusal(exp_avg, steps, *params[:1], *grads[:1], *low[:1])


implement(ADAMW, "cpu", _cpu, _cpu_supports)
implement(ADAMW, "triton", lazy("adamw", "adamw"), _triton_supports)
