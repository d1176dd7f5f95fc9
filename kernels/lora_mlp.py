"""The gated MLP with LoRA on any of its projections, as one differentiable block.

    G = gate(X), U = up(X)          two projections of one input, see lora.py
    H = act(G) * U                  glu.py
    Y = down(H)

Saved for backward: X, G, U and the small S's. H is not saved: the backward of the GLU rebuilds it in the pass that it
makes anyway, so the block keeps 2 I + K values per token where stock keeps act(G), H, and an input copy per adapter.

Shapes: X [..., K], G, U, H [M, I], Y [..., N]. Packed layouts (one gate_up projection) give G and U as halves of one
GEMM's output. Numerics and dtypes as in lora.py and glu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, glu
from .lora import Projection, compute_dtype, no_autocast, project, projections_backward, shrink
from .lora_linear import (
    check_projection,
    eager_projection,
    flatten,
    prepare,
    rows,
    sample_projection,
    unflatten,
    unrows,
)
from .registry import Sample, function


class _LoRAMLP(torch.autograd.Function):
    """Projections are (gate, up, down), or (gate_up, down) where one GEMM gives both halves."""

    @staticmethod
    def forward(ctx, x, act, dtype, static, *tensors):
        *inputs, down = unflatten(tensors, static)
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            s = shrink(x2, inputs)
            outs = project(x2, inputs, s)
            gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
            h = torch.ops.fuselora.glu(gate, up, act)
            s_down = shrink(h, [down])
            (y,) = project(h, [down], s_down)
            y = unrows(y, x)
        ctx.save_for_backward(x2, s, s_down, *outs, *tensors)
        ctx.act, ctx.static, ctx.shape, ctx.dtype = act, static, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        n = len(ctx.static) - 1
        x2, s, s_down, *rest = ctx.saved_tensors
        outs = rest[:n]
        *inputs, down = unflatten(rest[n:], ctx.static)
        *needs, need_down = unflatten(ctx.needs_input_grad[4:], ctx.static)
        need_h = bool(need_down.weight) or any(need.a for need in need_down.lora)
        with no_autocast(x2):
            douts: list[Tensor] = []

            def rebuild_h(dh: Tensor) -> Tensor:
                backward = torch.ops.fuselora.glu_bwd if n == 2 else torch.ops.fuselora.glu_packed_bwd
                *grads, h = backward(dh, *outs, ctx.act, need_h)
                douts.extend(grads)
                return h

            _, down_grads = projections_backward([rows(dy)], rebuild_h, [down], s_down, [need_down], True)
            dx, grads = projections_backward(douts, x2, inputs, s, needs, ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *flatten(grads + down_grads)[0]


def _apply(x: Tensor, inputs: list[Projection], down: Projection, act: str) -> Tensor:
    for name, proj in zip(("gate", "up") if len(inputs) == 2 else ("gate_up",), inputs, strict=True):
        check_projection("lora_mlp", name, x, proj)
    width = sum(proj.weight.shape[0] for proj in inputs) // 2
    checks.check_float("lora_mlp", "x", x)
    checks.check_dim("lora_mlp", "down.weight", down.weight, 1, width)
    checks.check_choice("lora_mlp", "act", act, glu.ACTIVATIONS)
    tensors, static = flatten([prepare(p, x) for p in (*inputs, down)])
    return _LoRAMLP.apply(x, act, compute_dtype(x), static, *tensors)


def lora_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str = "silu") -> Tensor:
    """down(act(gate(x)) * up(x)), each projection with or without its own adapter.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; under autocast everything is cast to the autocast dtype.
        gate, up: weights [I, K]; down: weight [N, I].
        act: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        [..., N] in the compute dtype.

    Raises:
        ValueError: wrong dtype, shape, device, dropout probability or activation.
    """
    return _apply(x, [gate, up], down, act)


def lora_mlp_packed(x: Tensor, gate_up: Projection, down: Projection, act: str = "silu") -> Tensor:
    """``lora_mlp`` where one projection of 2 I rows gives gate (first half) and up (second half), as in Phi-3."""
    return _apply(x, [gate_up], down, act)


def eager_lora_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection, act: str = "silu") -> Tensor:
    """Stock PEFT modules in the order that transformers' MLPs call them."""
    return eager_projection(glu.eager_glu(eager_projection(x, gate), eager_projection(x, up), act), down)


def eager_lora_mlp_packed(x: Tensor, gate_up: Projection, down: Projection, act: str = "silu") -> Tensor:
    gate, up = eager_projection(x, gate_up).chunk(2, dim=-1)
    return eager_projection(glu.eager_glu(gate, up, act), down)


def _samples(dtype: torch.dtype, device: torch.device, packed: bool = False) -> Iterator[Sample]:
    def make(n: int, k: int, rank: int | tuple[int, ...] = 8, **options) -> Projection:
        return sample_projection(dtype, device, n, k, rank, **options)

    def block(k: int, i: int, rank: int = 8, down: dict | None = None, **options) -> tuple[Projection, ...]:
        ups = (
            (make(2 * i, k, rank, **options),)
            if packed
            else (make(i, k, rank, **options), make(i, k, min(rank, 4), **options))
        )
        return (*ups, make(k, i, rank, **(options if down is None else down)))

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    sizes = ((80, 24), (24, 40)) if packed else ((40, 24), (40, 24), (24, 40))
    for act in glu.ACTIVATIONS:
        yield Sample(act, (x(2, 5, 24), *block(24, 40), act))
    for rank in (1, 7, 16):
        yield Sample(f"rank{rank}", (x(2, 5, 24), *block(24, 40, rank)))
    yield Sample("biases", (x(3, 24), *block(24, 40, bias=True, lora_bias=True)))
    yield Sample("dropout", (x(3, 5, 24), *block(24, 40, p=0.2)))
    yield Sample("two-adapters", (x(3, 5, 24), *(make(n, k, (4, 3), p=0.1) for n, k in sizes)))
    yield Sample("no-adapters", (x(3, 5, 24), *block(24, 40, 0, down={})))
    yield Sample("down-without-adapter", (x(3, 5, 24), *block(24, 40, 8)[:-1], make(24, 40, 0)))
    yield Sample("trained-base", (x(3, 5, 24), *block(24, 40, frozen=False)))
    # One row makes gradients of rank one: their largest error is that of a few numbers unless the LoRA rank is large.
    yield Sample("one-row", (x(1, 24), *block(24, 41, 32)))
    yield Sample("empty", (x(0, 24), *block(24, 40)))
    yield Sample(
        "non-contiguous",
        (torch.randn(6, 4, 24, dtype=dtype, device=device).transpose(0, 1).requires_grad_(), *block(24, 40)),
    )


function(lora_mlp, eager=eager_lora_mlp, samples=_samples, long_reduction=True)
function(
    lora_mlp_packed,
    eager=eager_lora_mlp_packed,
    samples=lambda dtype, device: _samples(dtype, device, packed=True),
    long_reduction=True,
)
