"""The gated MLP with LoRA on any of its projections, as one differentiable block.

    G = gate(X), U = up(X)          two projections of one input, see lora.py
    H = act(G) * U                  glu.py
    Y = down(H)

Saved for backward: X, or what makes it again if it is a norm's output (saving.py), G, U and the small S's. H is not
saved: the backward of the GLU rebuilds it in the pass that it makes anyway, so the block keeps 2 I values per token
(and K of X) where stock keeps act(G), H, and an input copy per adapter. Under ``saving.mlp_recompute`` only X is kept,
or what makes it again: backward makes G, U and H once more, for a tile of rows at a time (mlp_block.py).

Shapes: X [..., K], G, U, H [M, I], Y [..., N]. Packed layouts (one gate_up projection) give G and U as halves of one
GEMM's output. Numerics and dtypes as in lora.py and glu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import checks, glu
from .first_order import first_order
from .lora import Projection, compute_dtype, forward_weights, kept_weights, no_autocast
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
from .mlp_block import UntilH, down_product, gradients, tiled_gradients, tiled_output, tiles, until_h
from .registry import Sample, function
from .saving import kept_input, mlp_recomputes, normed_input, restored_input, saving_is_free


class _LoRAMLP(torch.autograd.Function):
    """Projections are (gate, up, down), or (gate_up, down) where one GEMM gives both halves.

    With ``late`` None the result is Y. Else it is a ``_placeholder``, and ``late`` is given what makes Y: ``_Output``.
    """

    @staticmethod
    def forward(ctx, x, act, dtype, static, normed, late, *tensors):
        projections = unflatten(tensors, static)
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            weights = forward_weights(projections, x2)
            block = until_h(x2, projections, act, weights)
            if late is None:
                result = unrows(down_product(block, projections[-1], weights[-1]), x)
        if late is not None:
            late.append(lambda: down_product(block, projections[-1], weights[-1]))
            result = _placeholder(x, projections[-1], dtype)
        source, norm_weight, ctx.how = kept_input(x2, normed)
        kept = kept_weights(projections, weights)
        ctx.save_for_backward(source, norm_weight, block.s, block.s_down, *block.outs, *kept, *tensors)
        ctx.act, ctx.static, ctx.shape, ctx.dtype, ctx.compute = act, static, x.shape, x.dtype, dtype
        ctx.kept = len(kept)
        return result

    @staticmethod
    @first_order
    def backward(ctx, dy):
        n = len(ctx.static) - 1
        source, norm_weight, s, s_down, *rest = ctx.saved_tensors
        outs, weights, tensors = rest[:n], rest[n : n + ctx.kept], rest[n + ctx.kept :]
        projections, needs = unflatten(tensors, ctx.static), unflatten(ctx.needs_input_grad[6:], ctx.static)
        block = UntilH(s, outs, None, s_down)
        with no_autocast(source):
            x2 = restored_input(source, norm_weight, ctx.how, ctx.compute)
            dx, grads = gradients(rows(dy), x2, block, projections, needs, ctx.needs_input_grad[0], ctx.act, weights)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None, None, *flatten(grads)[0]


class _RecomputedMLP(torch.autograd.Function):
    """Keeps X, or what makes it again, and nothing else: backward runs the block again, tile by tile."""

    @staticmethod
    def forward(ctx, x, act, dtype, static, normed, late, *tensors):
        projections, x2 = unflatten(tensors, static), rows(x).to(dtype)
        late.append(lambda: tiled_output(x2, projections, act))
        source, norm_weight, ctx.how = kept_input(x2, normed)
        ctx.save_for_backward(source, norm_weight, *tensors)
        ctx.act, ctx.static, ctx.shape, ctx.dtype, ctx.compute = act, static, x.shape, x.dtype, dtype
        return _placeholder(x, projections[-1], dtype)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        source, norm_weight, *tensors = ctx.saved_tensors
        projections, needs = unflatten(tensors, ctx.static), unflatten(ctx.needs_input_grad[6:], ctx.static)
        with no_autocast(source):
            x2 = restored_input(source, norm_weight, ctx.how, ctx.compute)
            dx, grads = tiled_gradients(rows(dy), x2, projections, needs, ctx.needs_input_grad[0], ctx.act)
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, None, None, *grads


class _Output(torch.autograd.Function):
    """Y, made behind the Function that saves what its backward needs: a recomputation that stops at the last saved
    tensor (``torch.utils.checkpoint``) then ends in front of the products made here, unless a later op saves too."""

    @staticmethod
    def forward(ctx, placeholder, make):
        with no_autocast(placeholder):
            return unrows(make(), placeholder)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def _placeholder(x: Tensor, down: Projection, dtype: torch.dtype) -> Tensor:
    """Y's shape and place in the graph, without memory."""
    return x.new_empty((), dtype=dtype).expand(*x.shape[:-1], down.weight.shape[0])


def _apply(x: Tensor, inputs: list[Projection], down: Projection, act: str) -> Tensor:
    checks.check_rows("lora_mlp", "x", x)
    for name, proj in zip(("gate", "up") if len(inputs) == 2 else ("gate_up",), inputs, strict=True):
        check_projection("lora_mlp", name, x, proj)
    width = sum(proj.weight.shape[0] for proj in inputs) // 2
    check_projection("lora_mlp", "down", x.new_empty(0, width), down)
    checks.check_choice("lora_mlp", "act", act, glu.ACTIVATIONS)
    tensors, static = flatten([prepare(p, x) for p in (*inputs, down)])
    free, recompute = _saving(x, width)
    block = _RecomputedMLP if recompute else _LoRAMLP
    late: list | None = [] if free or recompute else None
    y = block.apply(x, act, compute_dtype(x), static, normed_input(x), late, *tensors)
    return y if late is None else _Output.apply(y, late.pop())


def _saving(x: Tensor, width: int) -> tuple[bool, bool]:
    """(whether what the block saves is dropped and computed again, whether it should keep X only). Inside a layer that
    is computed again anyway, keeping only X pays from the second tile on."""
    if torch.compiler.is_compiling():
        return False, False
    free = saving_is_free()
    return free, mlp_recomputes() and (not free or len(tiles(x.shape[:-1].numel(), width)) > 1)


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
