"""The gated MLP block as plain functions: forward up to H, all gradients, and both over tiles of rows.

Tiles: where gate, up and H are made again in backward anyway, they need to exist for some rows only. A tile has at most
``TILE_ELEMENTS`` elements of H but not fewer than ``TILE_ROWS`` rows, so that its GEMMs run at full rate; at I = 14336
that is 4608 rows, and gate, up, H and their gradients take 0.8 GB in bf16 however long the sequence is. A function of
shapes only. Rows are independent, so outputs are those of the whole; parameter gradients are sums over tiles, added in
fp32. An adapter with dropout draws the mask of tile t from seed + t: one tile gives the bits of no tiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import glu_lora
from .lora import LoRA, Projection, adapters, forward_weights, project, projections_backward, shrink
from .lora_linear import flatten
from .registry import ops

TILE_ELEMENTS = 1 << 26
TILE_ROWS = 4096


class UntilH(NamedTuple):
    """S of gate and up, their outputs, H and S of down; the S's are None without adapters."""

    s: Tensor | None
    outs: Sequence[Tensor]
    h: Tensor | None
    s_down: Tensor | None


def until_h(x2: Tensor, projections: Sequence[Projection], act: str, weights: Sequence[Tensor | None]) -> UntilH:
    """Everything in front of the down product, for X [M, K]. ``projections``: gate, up, down or gate_up, down."""
    *inputs, down = projections
    s = shrink(x2, inputs)
    outs = project(x2, inputs, s, weights[:-1])
    gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
    h = ops.glu(gate, up, act)
    return UntilH(s, outs, h, shrink(h, [down]))


def down_product(block: UntilH, down: Projection, weight: Tensor | None) -> Tensor:
    """Y [M, N]."""
    assert block.h is not None
    return project(block.h, [down], block.s_down, [weight])[0]


def gradients(
    dy: Tensor,
    x2: Tensor,
    block: UntilH,
    projections: Sequence[Projection],
    needs: Sequence[Projection],
    need_dx: bool,
    act: str,
    weights: Sequence[Tensor],
) -> tuple[Tensor | None, list[Projection]]:
    """dX and the parameter gradients from dY [M, N]; H is not read. ``weights``: dense ones if they are there."""
    (*inputs, down), (*input_needs, need_down) = projections, needs
    between = GluBackward(act, block.outs, block.s, inputs, down, input_needs, need_down)
    _, down_grads = projections_backward([dy], between, [down], block.s_down, [between.need_down], True, weights[-1:])
    dx, grads = projections_backward(between.douts, x2, inputs, block.s, between.needs, need_dx, weights[:-1])
    return dx, between.complete([*grads, *down_grads])


def tiles(rows: int, width: int) -> list[slice]:
    """Slices of nearly equal size that cover ``rows`` rows of H [rows, width]; one, perhaps empty, if they are few."""
    most = max(TILE_ROWS, TILE_ELEMENTS // max(1, width) // 256 * 256)
    count = max(1, -(-rows // most))
    size = -(-rows // count)
    return [slice(i * size, min((i + 1) * size, rows)) for i in range(count)]


def _of_tile(projections: Sequence[Projection], tile: int) -> list[Projection]:
    """The projections with the dropout masks of a tile."""

    def own(lora: LoRA) -> LoRA:
        return lora if lora.seed is None or tile == 0 else lora._replace(seed=lora.seed + tile)

    return [p._replace(lora=tuple(own(lora) for lora in adapters(p.lora))) for p in projections]


def tiled_output(x2: Tensor, projections: Sequence[Projection], act: str) -> Tensor:
    """Y [M, N]."""
    down, parts = projections[-1], tiles(x2.shape[0], projections[-1].weight.shape[1])
    weights = forward_weights(projections, x2[parts[0]])

    def of(i: int) -> Tensor:
        own = _of_tile(projections, i)
        return down_product(until_h(x2[parts[i]], own, act, weights), own[-1], weights[-1])

    if len(parts) == 1:
        return of(0)
    y = x2.new_empty(x2.shape[0], down.weight.shape[0])
    for i, part in enumerate(parts):
        y[part] = of(i)
    return y


def tiled_gradients(
    dy: Tensor, x2: Tensor, projections: Sequence[Projection], needs: Sequence[Projection], need_dx: bool, act: str
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``gradients`` from X and dY alone, those of the parameters in the order of ``flatten``."""
    parts = tiles(x2.shape[0], projections[-1].weight.shape[1])
    weights = forward_weights(projections, x2[parts[0]])
    dense = [weight for weight in weights if weight is not None]
    kept = dense if len(dense) == len(weights) else []

    def of(i: int) -> tuple[Tensor | None, list[Tensor | None]]:
        own, x = _of_tile(projections, i), x2[parts[i]]
        block = until_h(x, own, act, weights)._replace(h=None)
        dx, grads = gradients(dy[parts[i]], x, block, own, needs, need_dx, act, kept)
        return dx, flatten(grads)[0]

    if len(parts) == 1:
        return of(0)
    dx = torch.empty_like(x2) if need_dx else None
    total: list[Tensor | None] = []
    for i, part in enumerate(parts):
        dx_part, grads = of(i)
        if dx is not None and dx_part is not None:
            dx[part] = dx_part
        if i == 0:
            total = [None if g is None else g.to(_sum_dtype(g)) for g in grads]
        else:
            total = [None if t is None or g is None else t.add_(g) for t, g in zip(total, grads, strict=True)]
    return dx, [None if t is None or g is None else t.to(g.dtype) for t, g in zip(total, grads, strict=True)]


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


class GluBackward:
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
            dgate, dup, self.fused = ops.glu_bwd_lora(dh, *self.outs, self.act, *self._factors(ds))
            self.douts = [dgate, dup]
            return dh  # no gradient that is left needs H
        need_h = bool(self.need_down.weight) or any(need.a for need in adapters(self.need_down.lora))
        backward = ops.glu_bwd if len(self.outs) == 2 else ops.glu_packed_bwd
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
