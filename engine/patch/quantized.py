"""4-bit linears, bitsandbytes' and ours, as tensors: what its forward computes right now, or why it must run itself.

    y = linear(x.to(compute dtype), dequantise(weight).to(compute dtype), bias).to(x.dtype)

Nothing of bitsandbytes is imported: without it no module is one of its classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.quantized_linear import Linear4bit
from fuselora.kernels.lora import Projection, autocasting, compute_dtype
from fuselora.kernels.nf4 import Quantized4bit

LINEARS_4BIT = {f"bitsandbytes.nn.modules:{name}" for name in ("Linear4bit", "LinearNF4", "LinearFP4")}
PEFT_4BIT = "peft.tuners.lora.bnb:Linear4bit"
KEEPS_DTYPE = (
    "where peft.prepare_model_for_kbit_training turned norms and embeddings to fp32, fuselora.prepare_kbit keeps their "
    "dtype"
)


def class_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def is_4bit(cls: type[nn.Module]) -> bool:
    """Whether modules of this very class are 4-bit linears, bitsandbytes' or ours."""
    return cls is Linear4bit or class_path(cls) in LINEARS_4BIT


def read_4bit(module: Any) -> Projection | str:
    """The weight and bias of a 4-bit linear (its hooks are the caller's matter), or why they can't be read."""
    if type(module) is Linear4bit:
        return (
            "nothing has been loaded into it yet"
            if module.absmax is None
            else Projection(module.quantized(), module.bias)
        )
    weight = module.weight
    if type(weight) is nn.Parameter and not weight.is_floating_point():  # FSDP2 gathers the bytes alone
        state = module.quant_state
    elif type(weight).__name__ != "Params4bit":
        return f"its weight is a {type(weight).__name__}"
    else:
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
            tuple(state.shape or ()),  # type: ignore[arg-type]  # what is no pair is refused with the other parts
            state.blocksize,
            *((nested.absmax, nested.code, state.offset, nested.blocksize) if nested is not None else ()),
        ),
        module.bias,
    )


def computes_in(x: Tensor, module: Any) -> torch.dtype:
    """The dtype in which a 4-bit linear multiplies. Left open, it becomes that of the first input if fp32 or bf16."""
    if type(module) is Linear4bit:
        return module.compute_dtype
    follows = not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype if follows or module.compute_dtype is None else module.compute_dtype


def base_reason(x: Tensor, module: Any) -> str | None:
    """Why the bare layer, casts of its input and output included, is not computed by us, or None."""
    return _autocast_reason(x) or _storage_reason(module, computes_in(x, module))


def _autocast_reason(x: Tensor) -> str | None:
    if compute_dtype(x) != x.dtype:
        return f"under autocast a 4-bit layer takes {x.dtype} and gives {x.dtype} back"
    return None


def _storage_reason(module: Any, computes: torch.dtype) -> str | None:
    if type(module) is Linear4bit:
        return None
    stored = (getattr(module.weight, "quant_state", None) or module.quant_state).dtype
    if stored in (computes, torch.float32):
        return None
    return f"the weight was quantised from {stored} and rounds through it; the layer computes in {computes}"


def base_dtype(x: Tensor, module: Any) -> torch.dtype:
    """The dtype in which a 4-bit linear multiplies, where a fused layer on it can: x's, or the narrower one that it
    casts an fp32 x to, as behind ``prepare_model_for_kbit_training``."""
    computes = computes_in(x, module)
    if x.dtype != torch.float32 or computes.itemsize != 2 or _storage_reason(module, computes):
        return x.dtype
    differs = autocasting(x) and compute_dtype(x) != computes
    return x.dtype if differs else computes


def compute_reason(x: Tensor, module: Any) -> str | None:
    """Why a fused layer on a 4-bit linear can't compute as that does, or None."""
    computes = computes_in(x, module)
    if base_dtype(x, module) != x.dtype:
        return None
    if reason := _autocast_reason(x):
        return reason
    if computes == x.dtype:
        return _storage_reason(module, computes)
    casts = f"the input is {x.dtype}, bnb_4bit_compute_dtype {computes}: every linear casts its input and its output"
    if computes.itemsize < x.dtype.itemsize:
        return f"{casts}; {KEEPS_DTYPE}"
    return f"{casts}; fuselora.prepare_kbit(model, compute_dtype={x.dtype}) avoids it"
