"""Differentiable LoRA linears: one layer, several layers that share an input (QKV), and the low-rank part alone.

The maths, what is saved and the numerics are those of ``lora.py``; this file is the autograd around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dropout import draw_seed, dropout_mask
from .first_order import first_order
from .lora import (
    LoRA,
    Projection,
    adapters,
    add_delta,
    autocasting,
    bias_grads,
    compute_dtype,
    forward_weights,
    kept_weights,
    low_rank_backward,
    no_autocast,
    project,
    projections_backward,
    route_mask,
    shrink,
)
from .nf4 import Quantized4bit, check_quantized
from .registry import Sample, function, ops
from .saving import kept_input, normed_input, restored_input

# Per projection: its weight if that is quantised (frozen, so autograd need not see it), and options per adapter.
Static = tuple[tuple[Quantized4bit | None, tuple[tuple[float, float, bool], ...]], ...]


def flatten(projections: Sequence[Projection]) -> tuple[list[Any], Static]:
    """(the tensors, gradients or flags as ``Function.apply`` takes them, what else a projection holds)."""
    values: list[Any] = []
    static = []
    for weight, bias, lora in projections:
        quantized = weight if isinstance(weight, Quantized4bit) else None
        values += [None if quantized else weight, bias]
        options = []
        for a, b, scaling, p, lora_bias, seed, split in adapters(lora):
            values += [a, b, lora_bias, seed]
            options.append((scaling, p, split))
        static.append((quantized, tuple(options)))
    return values, tuple(static)


def unflatten(values: Sequence[Any], static: Static) -> list[Projection]:
    """Inverse of ``flatten``, for tensors, gradients and flags alike."""
    projections, at = [], 0
    for quantized, options in static:
        weight, bias = values[at : at + 2]
        weight = quantized if weight is None and quantized else weight
        at += 2
        loras = []
        for scaling, p, split in options:
            a, b, lora_bias, seed = values[at : at + 4]
            loras.append(LoRA(a, b, scaling, p, lora_bias, seed, split))
            at += 4
        projections.append(Projection(weight, bias, tuple(loras)))
    return projections


def prepare(projection: Projection, x: Tensor) -> Projection:
    """Settle what the call depends on: dropout seeds (each adapter has its own mask, as in PEFT) and splits."""
    dtype = compute_dtype(x)
    loras = [prepare_lora(lora, x, dtype) for lora in adapters(projection.lora)]
    return Projection(projection.weight, projection.bias, tuple(loras))


def prepare_lora(lora: LoRA, x: Tensor, dtype: torch.dtype) -> LoRA:
    a, b, scaling, p, bias, seed, _ = lora
    seed = draw_seed() if p > 0.0 and seed is None else seed
    return LoRA(a, b, scaling, p, bias, seed, a.dtype.itemsize > dtype.itemsize and not autocasting(x))


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x.reshape(-1, x.shape[-1])


def unrows(y: Tensor, like: Tensor) -> Tensor:
    """[M, N] -> [..., N] with the leading dimensions of ``like``. Not a view to autograd: it forbids callers to
    change a view that a Function returns, and a stock linear's output may be changed in place.
    """
    return torch.ops.aten._unsafe_view.default(y, (*like.shape[:-1], y.shape[-1]))


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, static, normed, *tensors):
        ctx.set_materialize_grads(False)
        projections = unflatten(tensors, static)
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            s = shrink(x2, projections)
            weights = forward_weights(projections, x2)
            ys = tuple(unrows(y, x) for y in project(x2, projections, s, weights))
        kept = kept_weights(projections, weights)
        source, norm_weight, ctx.how = kept_input(x2, normed)
        ctx.save_for_backward(source, norm_weight, s, *kept, *tensors)
        ctx.static, ctx.shape, ctx.dtype, ctx.compute, ctx.kept = static, x.shape, x.dtype, dtype, len(kept)
        return ys

    @staticmethod
    @first_order
    def backward(ctx, *dys):
        source, norm_weight, s, *rest = ctx.saved_tensors
        weights, tensors = rest[: ctx.kept], rest[ctx.kept :]
        projections, needs = unflatten(tensors, ctx.static), unflatten(ctx.needs_input_grad[4:], ctx.static)
        with no_autocast(source):
            x2 = restored_input(source, norm_weight, ctx.how, ctx.compute)
            flat = [None if dy is None else rows(dy) for dy in dys]
            dx, grads = projections_backward(flat, x2, projections, s, needs, ctx.needs_input_grad[0], weights)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *flatten(grads)[0]


class _LoRADelta(torch.autograd.Function):
    """The tensors are those of one projection without weight and bias."""

    @staticmethod
    def forward(ctx, y, x, routes, static, *tensors):
        (projection,) = unflatten(tensors, static)
        with no_autocast(x):
            x2 = rows(x).to(y.dtype)
            s = shrink(x2, [projection])
            if routes is not None:
                s = s * route_mask(routes, s.shape[0], _ranks(projection))
            out = add_delta(rows(y), s, projection.lora)
        ctx.save_for_backward(x2, s, routes, *tensors)
        ctx.static, ctx.shape, ctx.dtype = static, x.shape, x.dtype
        return unrows(out, y)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x2, s, routes, *tensors = ctx.saved_tensors
        (projection,), (need,) = unflatten(tensors, ctx.static), unflatten(ctx.needs_input_grad[4:], ctx.static)
        dx = None
        with no_autocast(x2):
            dy2 = rows(dy)
            mask = None if routes is None else route_mask(routes, s.shape[0], _ranks(projection))
            dx2, _, grads = low_rank_backward([dy2], [], x2, [projection], s, [need], ctx.needs_input_grad[1], mask)
            _, dbiases = bias_grads(dy2, None, projection.lora, need)
        if dx2 is not None:
            dx = dx2.view(ctx.shape).to(ctx.dtype)
        grads = [grad._replace(bias=dbias) for grad, dbias in zip(grads, dbiases, strict=True)]
        return dy, dx, None, None, *flatten([Projection(None, None, tuple(grads))])[0]


def _ranks(projection: Projection) -> list[int]:
    return [one.a.shape[0] for one in adapters(projection.lora)]


def check_projection(op: str, name: str, x: Tensor, proj: Projection) -> None:
    """Raise ValueError unless shapes, devices and dropout probability fit the input."""
    if isinstance(proj.weight, Quantized4bit):
        check_quantized(f"{op}: {name}.weight", proj.weight)
    else:
        checks.check_float(op, f"{name}.weight", proj.weight)
    checks.check_ndim(op, f"{name}.weight", proj.weight, 2)
    checks.check_dim(op, f"{name}.weight", proj.weight, 1, x.shape[-1])
    if proj.bias is not None:
        _check_bias(op, f"{name}.bias", proj.bias, proj.weight.shape[0])
    checks.check_same_device(op, x=x, weight=proj.weight, bias=proj.bias)  # type: ignore[arg-type]
    check_adapters(op, f"{name}.lora", x, proj.lora, proj.weight.shape[0])


def _check_bias(op: str, name: str, bias: Tensor, size: int) -> None:
    checks.check_float(op, name, bias)
    checks.check_ndim(op, name, bias, 1)
    checks.check_dim(op, name, bias, 0, size)


def check_adapters(op: str, name: str, x: Tensor, lora: LoRA | tuple[LoRA, ...] | None, out_features: int) -> None:
    for j, one in enumerate(adapters(lora)):
        where = name if isinstance(lora, LoRA) else f"{name}[{j}]"
        checks.check_float(op, f"{where}.a", one.a)
        checks.check_float(op, f"{where}.b", one.b)
        checks.check_ndim(op, f"{where}.a", one.a, 2)
        checks.check_dim(op, f"{where}.a", one.a, 1, x.shape[-1])
        if one.a.shape[0] == 0:
            raise checks.fail(op, f"{where}.a.shape[0]", "a rank of at least 1", 0, "leave the adapter out")
        if one.b.shape != (out_features, one.a.shape[0]):
            expected = (out_features, one.a.shape[0])
            raise checks.fail(op, f"{where}.b.shape", expected, tuple(one.b.shape), "a and b must share their rank")
        if one.bias is not None:
            _check_bias(op, f"{where}.bias", one.bias, out_features)
        checks.check_range(op, f"{where}.p", one.p, 0.0, 1.0)
        checks.check_same_device(op, x=x, a=one.a, b=one.b, bias=one.bias)


def lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Several linears of one input, each with any number of adapters: one skinny GEMM for all A's, one dX.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64. Under autocast everything is cast to the autocast dtype.
        projections: each with weight [N_i, K], dense or 4-bit; see ``Projection`` and ``LoRA``.

    Returns:
        One [..., N_i] per projection, in the compute dtype.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability.
    """
    checks.check_rows("lora_linears", "x", x)
    for i, proj in enumerate(projections):
        check_projection("lora_linears", f"projections[{i}]", x, proj)
    tensors, static = flatten([prepare(p, x) for p in projections])
    return _LoRALinears.apply(x, compute_dtype(x), static, normed_input(x), *tensors)


def lora_linear(
    x: Tensor,
    weight: Tensor | Quantized4bit,
    bias: Tensor | None = None,
    lora: LoRA | tuple[LoRA, ...] | None = None,
) -> Tensor:
    """One linear with its adapters: x W^T + bias + sum_j scaling_j drop_j(x) A_j^T B_j^T. See ``lora_linears``."""
    return lora_linears(x, [Projection(weight, bias, lora)])[0]


def lora_delta(y: Tensor, x: Tensor, lora: LoRA | tuple[LoRA, ...], routes: Tensor | None = None) -> Tensor:
    """y + sum_j scaling_j drop_j(x) A_j^T B_j^T for a base layer that computes y by itself (a quantised one).

    Args:
        y: [..., N], the base layer's output; the result has its dtype.
        x: [..., K], the base layer's input.
        lora: one adapter, or several in a tuple.
        routes: [B] int64, which of them each sample of x [B, ..., K] gets, -1 for none (a batch of mixed adapters);
            None gives all of them to all samples.

    Raises:
        ValueError: wrong dtype, shape, device or dropout probability, no adapter, or a routed one with a bias.
    """
    checks.check_rows("lora_delta", "y", y)
    checks.check_rows("lora_delta", "x", x)
    if x.shape[:-1].numel() != y.shape[:-1].numel():
        raise checks.fail("lora_delta", "x", f"as many rows as y {tuple(y.shape)}", tuple(x.shape), "pass y's input")
    checks.check_same_device("lora_delta", x=x, y=y)
    check_adapters("lora_delta", "lora", x, lora, y.shape[-1])
    if not adapters(lora):
        raise checks.fail("lora_delta", "lora", "at least one adapter", lora, "use y where no adapter is active")
    if routes is not None:
        checks.check_ndim("lora_delta", "routes", routes, 1)
        checks.check_dim("lora_delta", "routes", routes, 0, x.shape[0])
        checks.check_same_device("lora_delta", x=x, routes=routes)
        if any(one.bias is not None for one in adapters(lora)):
            raise checks.fail("lora_delta", "lora.bias", "None where routes are given", "a bias", "use them one by one")
    loras = tuple(prepare_lora(one, x, y.dtype) for one in adapters(lora))
    tensors, static = flatten([Projection(None, None, loras)])  # type: ignore[arg-type]
    return _LoRADelta.apply(y, x, routes, static, *tensors)


def eager_projection(x: Tensor, proj: Projection) -> Tensor:
    """Stock PEFT: base layer, then result + B(A(dropout(x))) * scaling, in the input's dtype; the mask is explicit."""
    weight = proj.weight
    if isinstance(weight, Quantized4bit):
        weight = ops.dequantize_4bit(*weight.operands(), x.dtype)
    return eager_lora_delta(torch.nn.functional.linear(x, weight, proj.bias), x, proj.lora)


def eager_lora_delta(
    y: Tensor, x: Tensor, lora: LoRA | tuple[LoRA, ...] | None, routes: Tensor | None = None
) -> Tensor:
    result = y
    for j, one in enumerate(adapters(lora)):
        dropped = x.to(one.a.dtype)
        if one.p > 0.0:
            dropped = dropped * dropout_mask(one.seed, x.shape, one.p, x.device) * (1.0 / (1.0 - one.p))
        low = torch.nn.functional.linear(dropped, one.a)
        delta = torch.nn.functional.linear(low, one.b, one.bias) * one.scaling
        if routes is not None:
            delta = delta * (routes == j).view(-1, *(1,) * (delta.dim() - 1))
        result = result + delta
    return result.to(y.dtype)


def eager_lora_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    return tuple(eager_projection(x, proj) for proj in projections)


def sample_projection(
    dtype: torch.dtype,
    device: torch.device,
    n: int,
    k: int,
    rank: int | tuple[int, ...],
    *,
    bias=False,
    lora_bias=False,
    p=0.0,
    frozen=True,
) -> Projection:
    """A random projection; rank 0 means no adapter, several ranks several. Outputs are about 1."""

    def rand(*shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(shape, dtype=torch.float32, device=device) * shape[-1] ** -0.5
        return values.to(dtype).requires_grad_(grad)

    weight, base_bias = rand(n, k, grad=not frozen), rand(n, grad=not frozen) if bias else None
    loras = [
        LoRA(rand(r, k), rand(n, r), 2.0 + j, p, rand(n) if lora_bias else None, draw_seed() if p > 0.0 else None)
        for j, r in enumerate((rank,) if isinstance(rank, int) else rank)
        if r > 0
    ]
    return Projection(weight, base_bias, None if not loras else loras[0] if len(loras) == 1 else tuple(loras))


def _samples(dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    def make(n: int, k: int, rank: int | tuple[int, ...], **options) -> Projection:
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
    yield Sample(
        "several-adapters", (x(3, 7, 40), [make(24, 40, (8, 3, 5), bias=True, lora_bias=True), make(8, 40, 4)])
    )
    yield Sample("several-dropouts", (x(3, 7, 40), [make(24, 40, (8, 3), p=0.3), make(16, 40, (4, 4))]))
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
        y = torch.randn(*x.shape[:-1], adapters(lora)[0].b.shape[0], dtype=dtype, device=device).requires_grad_()
        yield Sample(sample.name, (y, x, lora))
    several = sample_projection(dtype, device, 24, 40, (4, 8, 3), p=0.2).lora
    x, y = (torch.randn(5, 3, width, dtype=dtype, device=device).requires_grad_() for width in (40, 24))
    yield Sample("routed", (y, x, several, torch.tensor([2, 0, -1, 1, 0], device=device)))


function(lora_linears, eager=eager_lora_linears, samples=_samples, long_reduction=True)
function(lora_delta, eager=eager_lora_delta, samples=_delta_samples, long_reduction=True)
