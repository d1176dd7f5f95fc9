"""The numerics rule as arithmetic: how far a result is from the fp64 truth, next to how far stock PyTorch is.

A result passes when it is about as close to the truth as stock gets in the same dtype::

    err(ours, truth) <= k * err(stock, truth) + one rounding of the dtype

Errors are measured two ways, as the largest and as the root mean square over the elements; the rounding is half an
epsilon of the dtype times the truth measured the same way. k is 1.5, and 2.5 for long reductions. ``fuselora.testing``
judges kernels with it, ``fuselora.engine.verify`` whole models.

A tensor of few elements (a loss) may come out of stock exactly right by luck, and no error would then be allowed
beyond the rounding: over 12 seeds that failed 10 of 4464 correct fp32 samples. So below ``FEW`` elements stock's
error counts as at least the rounding that its own result has suffered. Larger tensors always have an unlucky element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

K_ELEMENTWISE, K_REDUCTION = 1.5, 2.5
FEW = 256


@dataclass(frozen=True)
class Error:
    """One comparison by one measure (``max`` or ``rms``): errors of ours and of stock, and the size of the truth."""

    kind: str
    ours: float
    stock: float
    scale: float

    def bound(self, k: float, dtype: torch.dtype) -> float:
        """What ours may err by."""
        return k * self.stock + rounding(dtype) * self.scale


def rounding(dtype: torch.dtype) -> float:
    """The relative error of rounding one number to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over all elements."""
    return x.square().mean().sqrt()


def compare(ours: torch.Tensor, truth: torch.Tensor, stock: torch.Tensor) -> tuple[Error, Error]:
    """(max, rms) errors of two non-empty tensors of one shape against the fp64 ``truth``."""
    exact = truth.double()
    off, stock_off = (ours.double() - exact).abs(), (stock.double() - exact).abs()
    luck = rounding(stock.dtype) if stock.numel() < FEW else 0.0

    def error(kind: str, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Error:
        scale = reduce(exact.abs()).item()
        return Error(kind, reduce(off).item(), max(reduce(stock_off).item(), luck * scale), scale)

    return error("max", torch.amax), error("rms", rms)
