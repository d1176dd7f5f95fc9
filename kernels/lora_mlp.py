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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import checks, glu, glu_lora
from .lora import (
    LoRA,
    Projection,
    adapters,
    compute_dtype,
    forward_weights,
    kept_weights,
    no_autocast,
    project,
    projections_backward,
    shrink,
)
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
        projections = unflatten(tensors, static)
        *inputs, down = projections
        with no_autocast(x):
            x2 = rows(x).to(dtype)
            s = shrink(x2, inputs)
            weights = forward_weights(projections, x2)
            outs = project(x2, inputs, s, weights[:-1])
            gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
            h = torch.ops.fuselora.glu(gate, up, act)
            s_down = shrink(h, [down])
            (y,) = project(h, [down], s_down, weights[-1:])
            y = unrows(y, x)
        kept = kept_weights(projections, weights)
        ctx.save_for_backward(x2, s, s_down, *outs, *kept, *tensors)
        ctx.act, ctx.static, ctx.shape, ctx.dtype, ctx.kept = act, static, x.shape, x.dtype, len(kept)
        return y

    @staticmethod
    def backward(ctx, dy):
        n = len(ctx.static) - 1
        x2, s, s_down, *rest = ctx.saved_tensors
        outs, weights, tensors = rest[:n], rest[n : n + ctx.kept], rest[n + ctx.kept :]
        *inputs, down = unflatten(tensors, ctx.static)
        *needs, need_down = unflatten(ctx.needs_input_grad[4:], ctx.static)
        with no_autocast(x2):
            glu_backward = _GluBackward(ctx.act, outs, s, inputs, down, needs, need_down)
            _, down_grads = projections_backward(
                [rows(dy)], glu_backward, [down], s_down, [glu_backward.need_down], True, weights[-1:]
            )
            dx, grads = projections_backward(
                glu_backward.douts, x2, inputs, s, glu_backward.needs, ctx.needs_input_grad[0], weights[:-1]
            )
        grads = glu_backward.complete([*grads, *down_grads])
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return dx, None, None, None, *flatten(grads)[0]


class _GluBackward:
    """The pass between the down projection's backward and that of gate and up: given dH (and dS of down), it leaves
    dgate and dup in ``douts`` and returns H. Where it pays, the same pass makes the adapter gradients of H, dgate
    and dup (``glu_lora.py``): then H is never written, ``needs`` asks the two sides not to make them, and ``complete``
    puts them in place.
    """

    def __init__(
        self,
        act: str,
        outs: Sequence[Tensor],
        s: Tensor | None,
        inputs: Sequence[Projection],
        down: Projection,
        needs: Sequence[Projection],
        need_down: Projection,
    ) -> None:
        self.act, self.outs, self.s, self.inputs, self.down = act, list(outs), s, inputs, down
        self.needs, self.need_down, self.wanted = list(needs), need_down, [*needs, need_down]
        self.douts: list[Tensor] = []
        self.fused: list[Tensor] | None = None
        self.fuse = glu_lora.pays(outs, inputs, down, need_down)
        if self.fuse:
            self.needs = [need._replace(lora=_without(need, "b")) for need in needs]
            self.need_down = need_down._replace(lora=_without(need_down, "a"))

    def __call__(self, dh: Tensor, ds: Tensor | None) -> Tensor:
        if self.fuse:
            dgate, dup, self.fused = torch.ops.fuselora.glu_bwd_lora(dh, *self.outs, self.act, *self._factors(ds))
            self.douts = [dgate, dup]
            return dh  # no gradient that is left needs H
        need_h = bool(self.need_down.weight) or any(need.a for need in adapters(self.need_down.lora))
        backward = torch.ops.fuselora.glu_bwd if len(self.outs) == 2 else torch.ops.fuselora.glu_packed_bwd
        *self.douts, h = backward(dh, *self.outs, self.act, need_h)
        return h

    def _factors(self, ds: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None], list[float]]:
        """dS_down, S_gate, S_up; A_down, B_gate, B_up; the scalings; None for what is not needed."""
        loras = [next(iter(adapters(p.lora)), None) for p in (self.down, *self.inputs)]
        needs = [next(iter(adapters(need.lora)), None) for need in (self.wanted[-1], *self.wanted[:-1])]
        ranks = [lora.a.shape[0] for lora in loras[1:] if lora is not None]
        columns_of = iter(() if self.s is None else self.s.split(ranks, dim=1))
        factors = [ds, *(None if lora is None else next(columns_of) for lora in loras[1:])]
        wanted = [need is not None and bool(need.a if i == 0 else need.b) for i, need in enumerate(needs)]
        chosen = [factor if wants else None for factor, wants in zip(factors, wanted, strict=True)]
        tensors = [None if lora is None else (lora.a if i == 0 else lora.b) for i, lora in enumerate(loras)]
        scalings = [1.0, *(1.0 if lora is None else lora.scaling for lora in loras[1:])]
        return chosen, [t if f is not None else None for t, f in zip(tensors, chosen, strict=True)], scalings

    def complete(self, grads: list[Projection]) -> list[Projection]:
        """The gradients of (gate, up, down) with those that this pass made."""
        if self.fused is None:
            return grads
        da_down, db_gate, db_up = (grad if grad.numel() else None for grad in self.fused)
        parts = ({"b": db_gate}, {"b": db_up}, {"a": da_down})
        return [
            grad._replace(lora=tuple(one._replace(**part) for one in adapters(grad.lora)))
            for grad, part in zip(grads, parts, strict=True)
        ]


def _without(need: Projection, factor: str) -> tuple[LoRA, ...]:
    return tuple(one._replace(**{factor: False}) for one in adapters(need.lora))


def _apply(x: Tensor, inputs: list[Projection], down: Projection, act: str) -> Tensor:
    for name, proj in zip(("gate", "up") if len(inputs) == 2 else ("gate_up",), inputs, strict=True):
        check_projection("lora_mlp", name, x, proj)
    width = sum(proj.weight.shape[0] for proj in inputs) // 2
    checks.check_float("lora_mlp", "x", x)
    check_projection("lora_mlp", "down", x.new_empty(0, width), down)
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
