"""Blocks of projections that share an input, in the dtype that their linears compute in.

Where x is fp32 and the 4-bit linears below cast it to 16 bits, and their outputs back, a block casts once:

    autocast, or adapters of the 16-bit dtype   everything between the two casts is computed in 16 bits: stock rounds
                                                the base's output and the adapter's, this their sum, once
    fp32 adapters without autocast              the base in 16 bits, the low-rank part in fp32: lora_wide.py

The second is what ``peft.prepare_model_for_kbit_training`` leads to. Adapters in 16 bits would be faster there too, and
were measured: gradients 1.4 times as far from the truth as stock's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.patch.dequant_cache import with_copies
from fuselora.engine.patch.quantized import KEEPS_DTYPE, base_reason, computes_in, read_4bit
from fuselora.engine.patch.state import DoRA, input_reason, linear_dtype
from fuselora.engine.patch.swap import note
from fuselora.kernels.dora_linear import dora_linear
from fuselora.kernels.glu import glu, glu_packed
from fuselora.kernels.lora import LoRA, Projection, all_adapters, autocasting
from fuselora.kernels.lora_linear import lora_linear, lora_linears
from fuselora.kernels.lora_mlp import lora_mlp, lora_mlp_packed
from fuselora.kernels.lora_wide import lora_linears_wide


def _adapts_in(x: Tensor, base: torch.dtype, loras: Sequence[LoRA]) -> torch.dtype:
    """The dtype of the low-rank part: the base's, or x's."""
    narrow = autocasting(x) or all(lora.a.dtype == base for lora in loras)
    return base if narrow else x.dtype


def _note_casts(owner: nn.Module, x: Tensor, base: torch.dtype, adapts: torch.dtype) -> None:
    where = "its base linears multiply" if adapts == x.dtype else "it computes"
    casts = f"the input is {x.dtype}, bnb_4bit_compute_dtype {base}: {where} in {base}, between two casts"
    note(owner, f"{casts}; {KEEPS_DTYPE}")


def run_linears(
    owner: nn.Module, x: Tensor, linears: Sequence[nn.Module], projections: Sequence[Projection]
) -> tuple[Tensor, ...]:
    """The outputs, in x's dtype, of linears as ``read_projections`` read them."""
    base = linear_dtype(x, linears[0], projections[0])
    projections = with_copies(linears, projections, base)
    if base == x.dtype:
        return lora_linears(x, projections)
    adapts = _adapts_in(x, base, all_adapters(projections)[0])
    _note_casts(owner, x, base, adapts)
    if adapts == x.dtype:
        return lora_linears_wide(x, projections, base)
    return tuple(y.to(x.dtype) for y in lora_linears(x.to(base), projections))


def run_mlp(
    owner: nn.Module, x: Tensor, linears: Sequence[nn.Module], projections: Sequence[Projection], act: str
) -> Tensor:
    """The output, in x's dtype, of (gate, up, down) or (gate_up, down)."""
    compute: Any = lora_mlp if len(projections) == 3 else lora_mlp_packed
    base = linear_dtype(x, linears[0], projections[0])
    projections = with_copies(linears, projections, base)
    if base == x.dtype:
        return compute(x, *projections, act)
    adapts = _adapts_in(x, base, all_adapters(projections)[0])
    _note_casts(owner, x, base, adapts)
    if adapts != x.dtype:
        return compute(x.to(base), *projections, act).to(x.dtype)
    *inputs, down = projections
    activate: Any = glu if len(inputs) == 2 else glu_packed
    (y,) = lora_linears_wide(activate(*lora_linears_wide(x, inputs, base), act), [down], base)
    return y


def dora_dtype_reason(x: Tensor, module: nn.Module, dora: DoRA) -> str | None:
    """Why a DoRA layer can't be computed in the dtypes that it has, or None."""
    base = Projection(dora.weight, dora.bias)
    if reason := input_reason(x, module, base):
        return reason
    dtype = linear_dtype(x, module, base)
    if dtype != x.dtype and _adapts_in(x, dtype, [dora.lora]) == x.dtype:
        return f"DoRA's fp32 part on a base that multiplies in {dtype}; {KEEPS_DTYPE}"
    return None


def run_dora(owner: nn.Module, x: Tensor, dora: DoRA) -> Tensor:
    """The output, in x's dtype, of a DoRA layer that ``dora_dtype_reason`` lets pass."""
    base = Projection(dora.weight, dora.bias)
    dtype = linear_dtype(x, owner, base)
    dora = dora._replace(weight=with_copies([owner], [base], dtype)[0].weight)
    if dtype == x.dtype:
        return dora_linear(x, *dora)
    _note_casts(owner, x, dtype, dtype)
    return dora_linear(x.to(dtype), *dora).to(x.dtype)


def run_base(x: Tensor, linear: Any) -> Tensor | None:
    """The output, in x's dtype, of a bare 4-bit linear that casts its input to compute; None where bitsandbytes must
    do it."""
    projection = read_4bit(linear)
    if isinstance(projection, str) or base_reason(x, linear):
        return None
    computes = computes_in(x, linear)
    (projection,) = with_copies([linear], [projection], computes)
    bias = None if projection.bias is None else projection.bias.to(computes)
    return lora_linear(x.to(computes), projection.weight, bias).to(x.dtype)
