"""The bare matrix products of a training step, as one more side that takes turns with the others: the step's floor.

Every frozen linear multiplies twice, Y = X W^T in the forward pass and dX = dY W in the backward pass, by torch's own
matmul in the dtype of the base, on random X and dY of the step's token count; the head on the rows that have a target.
Which linears a step calls, and whether their input needs a gradient (the first layer's does not on a frozen embedding),
is seen in a forward pass of a few tokens. Weights are the model's own, so caches are as cold as in training; in place
of quantised ones stands a dense one of the shape. Left out: attention, the adapters' products, the recomputation of
checkpointing, products that are no linear (experts kept in one tensor). A step over this time says what all of that
and everything that is no product cost together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Product:
    """``weight`` [N, K] on ``rows`` rows; ``backward``: the input's gradient is needed."""

    weight: Tensor
    rows: int
    backward: bool

    @property
    def flops(self) -> int:
        return 2 * (1 + self.backward) * self.rows * self.weight.numel()


def products(model: nn.Module, batch: Mapping[str, Tensor], dtype: torch.dtype) -> list[Product]:
    """The products of the frozen linears of ``model``, stock PEFT, in the order of a forward pass on ``batch``."""
    tokens, trained = batch["input_ids"].numel(), int((batch["labels"][:, 1:] != -100).sum())
    head = model.get_base_model().get_output_embeddings()
    dense: dict[tuple[int, int], Tensor] = {}
    found: list[Product] = []

    def saw(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        (x,), shape = inputs, (linear.out_features, linear.in_features)
        weight = linear.weight.detach()
        if not weight.is_floating_point():
            weight = dense.setdefault(shape, torch.randn(shape, dtype=dtype, device=x.device) * shape[1] ** -0.5)
        rows = trained if linear is head else x.numel() // x.shape[-1] * tokens // PROBE_TOKENS
        found.append(Product(weight.to(dtype), rows, x.requires_grad))

    frozen = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    hooks = [linear.register_forward_pre_hook(saw) for linear in frozen]
    try:
        model(input_ids=batch["input_ids"][:1, :PROBE_TOKENS])
    finally:
        for hook in hooks:
            hook.remove()
    return found


class BareGemms:
    """Takes steps as ``timing.Trainer`` does, of products alone."""

    def __init__(self, found: list[Product], dtype: torch.dtype, device: torch.device) -> None:
        self.found, self.device = found, device
        sizes = {(p.rows, width) for p in found for width in p.weight.shape}
        self.data = {size: torch.randn(size, device=device).to(dtype) for size in sizes}

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.found)

    @torch.no_grad()
    def step(self) -> timing.StepTime:
        clock = timing.clock(self.device)
        clock.mark()
        for p in self.found:
            F.linear(self.data[p.rows, p.weight.shape[1]], p.weight)
        clock.mark()
        for p in reversed(self.found):
            if p.backward:
                self.data[p.rows, p.weight.shape[0]] @ p.weight
        clock.mark()
        clock.mark()
        return clock.read()
