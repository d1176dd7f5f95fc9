"""Differentiable LoRA linears: one layer, several layers that share an input (QKV), and the low-rank part alone.

The maths, what is saved and the numerics are those of ``lora.py``; this file is the autograd around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import checks
from .dropout import draw_seed, dropout_mask
from .lora import (
    LoRA,
    Projection,
    compute_dtype,
    delta_input_grad,
    no_autocast,
    output_grads,
    project,
    projections_backward,
    scaled_b,
    shrink,
    twice,
)
from .registry import Sample, function

FIELDS = 6  # tensors per projection in a flat argument list: weight, bias, a, b, lora_bias, seed

Static = tuple[tuple[float, float, bool] | None, ...]


def flatten(projections: Sequence[Projection]) -> tuple[list[Tensor | None], Static]:
    """(tensors for ``Function.apply``, (scaling, p, split) per projection or None without adapter)."""
    tensors: list[Tensor | None] = []
    for weight, bias, lora in projections:
        tensors += [weight, bias, *((None,) * 4 if lora is None else (lora.a, lora.b, lora.bias, lora.seed))]
    return tensors, tuple(None if p.lora is None else (p.lora.scaling, p.lora.p, p.lora.split) for p in projections)


def unflatten(tensors: Sequence[Tensor | None], static: Static) -> list[Projection]:
    """Inverse of ``flatten``."""
    projections = []
    for i, options in enumerate(static):
        weight, bias, a, b, lora_bias, seed = tensors[FIELDS * i : FIELDS * (i + 1)]
        lora = None
        if options is not None:
            scaling, p, split = options
            lora = LoRA(a, b, scaling, p, lora_bias, seed, split)
        projections.append(Projection(weight, bias, lora))
    return projections


def prepare(projection: Projection, x: Tensor) -> Projection:
    """Settle what the call depends on: the dropout seed (each adapter has its own mask, as in PEFT) and the split."""
    lora = projection.lora
    return projection if lora is None else projection._replace(lora=prepare_lora(lora, x, compute_dtype(x)))


def prepare_lora(lora: LoRA, x: Tensor, dtype: torch.dtype) -> LoRA:
    wider = torch.finfo(lora.a.dtype).bits > torch.finfo(dtype).bits
    seed = draw_seed() if lora.p > 0.0 and lora.seed is None else lora.seed
    return lora._replace(seed=seed, split=wider and not torch.is_autocast_enabled(x.device.type))


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x.reshape(-1, x.shape[-1])


def unrows(y: Tensor, like: Tensor) -> Tensor:
    """[M, N] -> [..., N] with the leading dimensions of ``like``. Not a view to autograd: it forbids callers to
    change a view that a Function returns, and a stock linear's output may be changed in place.
    """
    return torch.ops.aten._unsafe_view(y, (*like.shape[:-1], y.shape[-1]))


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, static, *tensors):
        ctx.set_materialize_grads(False)
        projections = unflatten(tensors, static)
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            ss = shrink(x2, projections)
            ys = tuple(unrows(project(x2, p, s), x) for p, s in zip(projections, ss, strict=True))
        ctx.save_for_backward(x2, *ss, *tensors)
        ctx.static, ctx.shape, ctx.dtype = static, x.shape, x.dtype
        return ys

    @staticmethod
    def backward(ctx, *dys):
        n = len(ctx.static)
        x2, *rest = ctx.saved_tensors
        ss, projections = rest[:n], unflatten(rest[n:], ctx.static)
        needs = [ctx.needs_input_grad[3 + FIELDS * i : 3 + FIELDS * (i + 1)] for i in range(n)]
        with no_autocast(x2):
            flat = [None if dy is None else rows(dy) for dy in dys]
            dx, grads = projections_backward(flat, x2, projections, ss, needs, ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, *(g for group in grads for g in (*group, None))


class _LoRADelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, options, a, b, bias, seed):
        scaling, p, split = options
        lora = LoRA(a, b, scaling, p, bias, seed, split)
        with no_autocast(x):
            x2, y2 = rows(x).to(y.dtype), rows(y)
            (s,) = shrink(x2, [Projection(b, None, lora)])
            base = y2 if bias is None else y2 + (bias * scaling).to(y.dtype)
            out = torch.addmm(base, twice(s, lora), scaled_b(lora, y.dtype).t())
        ctx.save_for_backward(x2, s, a, b, bias, seed)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        return unrows(out, y)

    @staticmethod
    def backward(ctx, dy):
        x2, s, a, b, bias, seed = ctx.saved_tensors
        scaling, p, split = ctx.options
        lora, needs = LoRA(a, b, scaling, p, bias, seed, split), ctx.needs_input_grad
        dx = da = dbias = None
        with no_autocast(x2):
            dy2 = rows(dy)
            ds, db = output_grads(dy2, s, lora)
            if needs[3]:
                dropped = x2 if p == 0.0 else torch.ops.fuselora.dropout(x2, seed, p)
                da = torch.ops.fuselora.lora_grad_a(ds, dropped, a.dtype)
            if needs[1]:
                dx = delta_input_grad(ds, lora).view(ctx.shape).to(ctx.dtype)
            if needs[5]:
                acc = torch.promote_types(dy.dtype, torch.float32)
                dbias = (dy2.sum(0, dtype=acc) * scaling).to(bias.dtype)
        return dy, dx, None, da, db if needs[4] else None, dbias, None


def check_projection(op: str, name: str, x: Tensor, proj: Projection) -> None:
    """Raise ValueError unless shapes, devices and dropout probability fit the input."""
    checks.check_ndim(op, f"{name}.weight", proj.weight, 2)
    checks.check_dim(op, f"{name}.weight", proj.weight, 1, x.shape[-1])
    if proj.bias is not None:
        checks.check_dim(op, f"{name}.bias", proj.bias, 0, proj.weight.shape[0])
    checks.check_same_device(op, x=x, weight=proj.weight)
    if proj.lora is not None:
        check_lora(op, name, x, proj.lora, proj.weight.shape[0])


def check_lora(op: str, name: str, x: Tensor, lora: LoRA, out_features: int) -> None:
    checks.check_ndim(op, f"{name}.lora.a", lora.a, 2)
    checks.check_dim(op, f"{name}.lora.a", lora.a, 1, x.shape[-1])
    if lora.b.shape != (out_features, lora.a.shape[0]):
        expected = (out_features, lora.a.shape[0])
        raise checks.fail(op, f"{name}.lora.b.shape", expected, tuple(lora.b.shape), "a and b must share their rank")
    checks.check_range(op, f"{name}.lora.p", lora.p, 0.0, 1.0)
    checks.check_same_device(op, x=x, a=lora.a, b=lora.b)


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Several linears, each with or without an adapter, of one input: one skinny GEMM for all A's, one dX.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64. Under autocast everything is cast to the autocast dtype.
        projections: each with weight [N_i, K]; see ``Projection`` and ``LoRA``.

    Returns:
        One [..., N_i] per projection, in the compute dtype.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability.
    """
    checks.check_float("lora_linears", "x", x)
    for i, proj in enumerate(projections):
        check_projection("lora_linears", f"projections[{i}]", x, proj)
    tensors, static = flatten([prepare(p, x) for p in projections])
    return _LoRALinears.apply(x, compute_dtype(x), static, *tensors)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lora: LoRA | None = None) -> Tensor:
    """One linear with an adapter: x W^T + bias + scaling drop(x) A^T B^T. See ``lora_linears``."""
    return lora_linears(x, [Projection(weight, bias, lora)])[0]


def lora_delta(y: Tensor, x: Tensor, lora: LoRA) -> Tensor:
    """y + scaling drop(x) A^T B^T for a base layer that computes y by itself (a quantised one, a second adapter).

    Args:
        y: [..., N], the base layer's output; the result has its dtype.
        x: [..., K], the base layer's input.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability.
    """
    checks.check_float("lora_delta", "y", y)
    checks.check_float("lora_delta", "x", x)
    check_lora("lora_delta", "lora", x, lora, y.shape[-1])
    lora = prepare_lora(lora, x, y.dtype)
    return _LoRADelta.apply(y, x, (lora.scaling, lora.p, lora.split), lora.a, lora.b, lora.bias, lora.seed)


def eager_projection(x: Tensor, proj: Projection) -> Tensor:
    """Stock PEFT: base layer, then result + B(A(dropout(x))) * scaling, in the input's dtype; the mask is explicit."""
    result = torch.nn.functional.linear(x, proj.weight, proj.bias)
    return result if proj.lora is None else eager_lora_delta(result, x, proj.lora)


def eager_lora_delta(y: Tensor, x: Tensor, lora: LoRA) -> Tensor:
    dropped = x.to(lora.a.dtype)
    if lora.p > 0.0:
        dropped = dropped * dropout_mask(lora.seed, x.shape, lora.p, x.device) * (1.0 / (1.0 - lora.p))
    low = torch.nn.functional.linear(dropped, lora.a)
    return (y + torch.nn.functional.linear(low, lora.b, lora.bias) * lora.scaling).to(y.dtype)


def eager_lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    return tuple(eager_projection(x, proj) for proj in projections)


def sample_projection(
    dtype: torch.dtype,
    device: torch.device,
    n: int,
    k: int,
    rank: int,
    *,
    bias=False,
    lora_bias=False,
    p=0.0,
    frozen=True,
) -> Projection:
    """A random projection; rank 0 means no adapter. Values are scaled so that outputs are about 1."""

    def rand(*shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(shape, dtype=torch.float32, device=device) * shape[-1] ** -0.5
        return values.to(dtype).requires_grad_(grad)

    weight, base_bias = rand(n, k, grad=not frozen), rand(n, grad=not frozen) if bias else None
    if rank == 0:
        return Projection(weight, base_bias)
    seed = draw_seed() if p > 0.0 else None
    return Projection(
        weight, base_bias, LoRA(rand(rank, k), rand(n, rank), 2.0, p, rand(n) if lora_bias else None, seed)
    )


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def make(n: int, k: int, rank: int, **options) -> Projection:
        return sample_projection(dtype, device, n, k, rank, **options)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    for rank in (1, 4, 7, 8, 16, 64):
        yield Sample(f"rank{rank}", (x(2, 5, 40), [make(24, 40, rank)]))
    yield Sample("one-row", (x(1, 40), [make(24, 40, 8, bias=True)]))
    yield Sample("empty", (x(0, 40), [make(24, 40, 8)]))
    yield Sample("qkv", (x(3, 7, 40), [make(40, 40, 8, bias=True), make(20, 40, 4, lora_bias=True), make(20, 40, 16)]))
    yield Sample("q-and-v-only", (x(3, 7, 40), [make(40, 40, 8), make(20, 40, 0, bias=True), make(20, 40, 8)]))
    yield Sample("dropout", (x(3, 7, 40), [make(40, 40, 8, p=0.3), make(20, 40, 8), make(20, 40, 8, p=0.1)]))
    yield Sample("trained-base", (x(9, 24), [make(16, 24, 4, bias=True, frozen=False), make(8, 24, 0, frozen=False)]))
    yield Sample(
        "non-contiguous",
        (torch.randn(6, 4, 40, dtype=dtype, device=device).transpose(0, 1).requires_grad_(), [make(24, 40, 8)]),
    )
    yield Sample(
        "zero-stride",
        (torch.randn(1, 40, dtype=dtype, device=device).expand(6, 40).requires_grad_(), [make(24, 40, 8)]),
    )
    yield Sample("long", (x(257, 264), [make(136, 264, 256, bias=True)]))


def _delta_samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    for sample in _samples(dtype, device):
        x, projections = sample.args
        lora = projections[0].lora
        y = torch.randn(*x.shape[:-1], lora.b.shape[0], dtype=dtype, device=device).requires_grad_()
        yield Sample(sample.name, (y, x, lora))


function(lora_linears, eager=eager_lora_linears, samples=_samples, long_reduction=True)
function(lora_delta, eager=eager_lora_delta, samples=_delta_samples, long_reduction=True)
