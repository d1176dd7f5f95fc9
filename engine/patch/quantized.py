"""bitsandbytes' 4-bit linear as tensors: what its forward computes right now, or why it must run itself.

    y = linear(x.to(compute dtype), dequantise(weight).to(compute dtype), bias).to(x.dtype)

Nothing of bitsandbytes is imported: without it no module is one of its classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuselora.kernels.lora import Projection
from fuselora.kernels.nf4 import Quantized4bit

LINEARS_4BIT = {f"bitsandbytes.nn.modules:{name}" for name in ("Linear4bit", "LinearNF4", "LinearFP4")}
PEFT_4BIT = "peft.tuners.lora.bnb:Linear4bit"


def class_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def is_4bit(cls: type[nn.Module]) -> bool:
    """Whether modules of this very class are bitsandbytes' 4-bit linears."""
    return class_path(cls) in LINEARS_4BIT


def read_4bit(module: Any) -> Projection | str:
    """The weight and bias of a 4-bit linear (its hooks are the caller's matter), or why they can't be read."""
    weight = module.weight
    if type(weight).__name__ != "Params4bit":
        return f"its weight is a {type(weight).__name__}"
    state = weight.quant_state
    if state is None:
        return "its weight is not quantised yet: move the model to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked its weight for CPU inference"
    if module.bias is not None and type(module.bias) not in (nn.Parameter, Tensor):
        return f"its bias is a {type(module.bias).__name__}"
    nested = state.state2
    return Projection(
        Quantized4bit(
            weight.data.reshape(-1).view(torch.uint8),
            state.absmax,
            state.code,
            (state.shape[0], state.shape[1]),
            state.blocksize,
            *((nested.absmax, nested.code, state.offset, nested.blocksize) if nested is not None else ()),
        ),
        module.bias,
    )


def compute_reason(x: Tensor, module: Any) -> str | None:
    """Why a 4-bit linear does not compute in x's dtype, or None."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return f"under autocast a 4-bit layer takes {x.dtype} and gives {x.dtype} back"
    # Left open, the compute dtype becomes that of the first input if it is fp32 or bf16.
    follows = not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16)
    computes = x.dtype if follows or module.compute_dtype is None else module.compute_dtype
    if computes != x.dtype:
        return f"the input is {x.dtype}, bnb_4bit_compute_dtype {computes}"
    stored = module.weight.quant_state.dtype
    if stored not in (x.dtype, torch.float32):
        return f"the weight was quantised from {stored} and rounds through it; the input is {x.dtype}"
    return None
