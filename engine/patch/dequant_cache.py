"""Dense copies of frozen 4-bit weights, kept between passes within a budget that the user gives.

A step dequantises every 4-bit weight two or three times: for forward, for recomputation and for backward. Where memory
is plentiful the copies may stay, at 16 bits per weight beside 4, and a step costs what LoRA on a dense base costs. Free
memory is never asked: layers are taken in the model's order as long as the next one's copy fits the budget.

A copy is made at the first use and belongs to the bytes it was made from. A weight that was replaced, moved or changed
in place (as autograd counts changes) is dequantised anew; the old bytes are held until then, so that no other weight
can have taken their address. A deep copy of the model starts without copies and without a budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fuselora.engine.patch.quantized import is_4bit
from fuselora.engine.patch.swap import LOCK, Fused, is_fused, stock_class
from fuselora.kernels.lora import Projection
from fuselora.kernels.nf4 import Quantized4bit


@dataclass
class Kept:
    """One layer's copy; ``fits`` says whether it is within the budget."""

    fits: bool
    dense: Tensor | None = None
    made_from: tuple[Tensor, ...] = ()
    state: tuple[Any, ...] = ()


_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()


def fused_linears(model: nn.Module) -> Iterator[nn.Module]:
    """The 4-bit linears whose weights fused modules read, in the model's order; some come more than once."""
    for module in model.modules():
        if not isinstance(module, Fused) or not is_fused(module):
            continue
        for linear in module.fuse_linears() if hasattr(module, "fuse_linears") else (module,):
            base = linear if is_4bit(stock_class(linear)) else getattr(linear, "base_layer", None)
            if base is not None and is_4bit(stock_class(base)):
                yield base


def check_budget(gigabytes: float | None) -> None:
    """Raise ValueError unless it is a size in GB, infinity included."""
    if gigabytes is not None and not gigabytes >= 0.0:
        raise ValueError(
            f"patch_model: dequant_cache_gb: expected a size in GB of 0 or more, got {gigabytes}; float('inf') keeps "
            "every layer's copy"
        )


def set_budget(linears: Iterable[Any], gigabytes: float) -> None:
    """Choose among 4-bit linears, in order, those whose dense copies may be kept; copies that exist are released."""
    left = gigabytes * 1e9
    with LOCK:
        for linear in dict.fromkeys(linears):
            size = linear.in_features * linear.out_features * (linear.compute_dtype or torch.bfloat16).itemsize
            fits = size <= left
            left -= size if fits else 0
            if gigabytes:
                _KEPT[linear] = Kept(fits)
            else:
                _KEPT.pop(linear, None)


def release(model: nn.Module) -> None:
    """Forget the copies and the budget of a model."""
    with LOCK:
        for module in model.modules():
            _KEPT.pop(module, None)


def kept_bytes(model: nn.Module) -> int:
    """Memory of the dense copies that exist now."""
    entries = (_KEPT.get(module) for module in model.modules())
    return sum(entry.dense.nbytes for entry in entries if entry is not None and entry.dense is not None)


def cache_note(linear: nn.Module) -> str:
    """What the report says of a 4-bit linear; empty where no budget was given."""
    entry = _KEPT.get(linear)
    if entry is None:
        return ""
    if not entry.fits:
        return "dequantised at every pass: its copy does not fit dequant_cache_gb"
    size = "" if entry.dense is None else f", {entry.dense.nbytes / 1e6:.1f} MB"
    return f"dequantised once: its {'copy is kept' if size else 'copy will be kept'} (dequant_cache_gb{size})"


def with_copies(
    linears: Sequence[nn.Module], projections: Sequence[Projection], dtype: torch.dtype
) -> list[Projection]:
    """The projections, with the kept copies in ``dtype`` in the place of 4-bit weights."""
    if not _KEPT or torch.compiler.is_compiling():  # a graph would hold a copy as a constant of its own
        return list(projections)
    return [
        proj._replace(weight=_copy(linear, proj.weight, dtype)) if isinstance(proj.weight, Quantized4bit) else proj
        for linear, proj in zip(linears, projections, strict=True)
    ]


def _copy(module: Any, weight: Quantized4bit, dtype: torch.dtype) -> Tensor | Quantized4bit:
    linear = module if is_4bit(stock_class(module)) else module.base_layer
    entry = _KEPT.get(linear)
    if entry is None or not entry.fits:
        return weight
    sources = tuple(t for t in (linear.weight, *weight[:3], *weight[5:8]) if isinstance(t, Tensor))
    state = (dtype, weight.shape, *((t.data_ptr(), 0 if t.is_inference() else t._version) for t in sources))
    with LOCK:
        if entry.state != state or entry.dense is None:
            with torch.inference_mode(False):  # made in a generation, it may be needed by a training step
                entry.dense = torch.ops.fuselora.dequantize_4bit(*weight.operands(), dtype)
            entry.made_from, entry.state = tuple(t.data for t in sources), state
        return entry.dense
