"""What a linear layer computes *right now*: read at every call, because PEFT's state may change between any two.

``read_projection`` answers with the tensors of a plain linear and of the plain LoRA adapters active on it,
``read_dora`` with those of a linear and its DoRA adapter, or with the reason why the layer's own forward must run.
Nothing of a module's state is cached: adapters are hot-swapped, scaled, switched, merged and moved. Only what follows
from a class alone is kept (``linear_kind``). Reading is cheap instead: ``nn.Module.__getattr__`` costs half a
microsecond a name, a layer has 150 of them, so ``child`` and ``parameter`` look into the dictionaries behind it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from peft.tuners import lora as peft_lora
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fuselora.engine.patch.quantized import (
    PEFT_4BIT,
    base_dtype,
    class_path,
    compute_reason,
    is_4bit,
    read_4bit,
)
from fuselora.engine.patch.swap import is_fused, stock_class
from fuselora.kernels.lora import LoRA, Projection, autocasting
from fuselora.kernels.nf4 import Quantized4bit

PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)  # fake: memory is estimated on them


def child(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` for what is a submodule as a rule."""
    children = module._modules
    return children[name] if name in children else getattr(module, name)


def parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)`` for what is a parameter as a rule (FSDP and weight_norm set plain attributes)."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of ``module.parameters()``, which puts every submodule's name together on the way."""
    for own in module._parameters.values():
        if own is not None:
            return own
    for part in module._modules.values():
        if part is not None and (own := first_parameter(part)) is not None:
            return own
    return None


def bypass_reason(module: nn.Module) -> str | None:
    """Why calling a module's tensors without calling the module would lose something, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{type(module).__name__} has hooks that the fused path would bypass"
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) not in (
        type(module).forward,
        stock_class(module).forward,
    ):
        return (
            f"{type(module).__name__} has a forward of its own on the instance (an accelerate hook or another patcher)"
        )
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks for all modules are registered (a profiler or FLOP counter?)"
    return None


def unwrapped(module: Any) -> Any:
    """What runs when a module is called: inside PEFT's ``modules_to_save`` wrapper, as it is set now, the trained copy
    or the original; any other module, and a wrapper with hooks, itself."""
    if type(module) is not ModulesToSaveWrapper or bypass_reason(module):
        return module
    names = module.active_adapters
    if module.disable_adapters or not names or any(name not in module.modules_to_save for name in names):
        return module.original_module
    return module.modules_to_save[names[0]]


def tensor_reason(tensor: Tensor | None) -> str | None:
    """Why a weight can't be read directly: sharded (DTensor), quantised, or another tensor subclass."""
    if tensor is None or type(tensor) in PLAIN_TENSORS:
        return None
    return f"its weight is a {type(tensor).__name__}"


def dtype_reason(x: Tensor, weight: Tensor) -> str | None:
    """Without autocast a linear needs matching dtypes; stock raises the error where they differ."""
    if x.dtype == weight.dtype or autocasting(x):
        return None
    return f"the input is {x.dtype}, the weight {weight.dtype}"


def read_plain(module: nn.Module) -> Projection | str:
    """A bare ``nn.Linear``."""
    weight, bias = parameter(module, "weight"), parameter(module, "bias")
    reason = bypass_reason(module) or tensor_reason(weight) or tensor_reason(bias)
    return reason or Projection(weight, bias)


def active_adapters(module: Any) -> list[str]:
    """The adapters that a LoRA layer would add to its base right now, in order."""
    if module.disable_adapters or module.merged:
        return []
    known = child(module, "lora_A")._modules
    return [name for name in module.active_adapters if name in known]


def casts_input(module: Any) -> bool:
    """Whether PEFT may cast a LoRA layer's input to the adapter's dtype, as it does unless told otherwise."""
    return getattr(module, "cast_input_dtype_enabled", True)


def state_reason(module: Any) -> str | None:
    """PEFT states that only the layer's own forward handles."""
    if module.disable_adapters and module.merged:
        return "adapters are disabled while merged: PEFT unmerges in forward"
    return None


def read_adapter(module: Any, name: str) -> LoRA | str:
    """One adapter of a LoRA layer, or the reason why it is not plain LoRA."""
    if name in module.lora_variant:
        return f"adapter {name!r} uses the variant {type(module.lora_variant[name]).__name__}"
    return _read_factors(module, name)


def _read_factors(module: Any, name: str) -> LoRA | str:
    """A, B, scaling and dropout of an adapter of any variant."""
    a, b = child(module, "lora_A")._modules[name], child(module, "lora_B")._modules[name]
    dropout = child(module, "lora_dropout")._modules[name]
    for part in (a, b):
        if type(part) is not nn.Linear:
            return f"adapter {name!r} is made of {type(part).__name__}"
        reason = bypass_reason(part) or tensor_reason(parameter(part, "weight"))
        if reason:
            return f"adapter {name!r}: {reason}"
    down, up, bias = parameter(a, "weight"), parameter(b, "weight"), parameter(b, "bias")
    if parameter(a, "bias") is not None or down.dtype != up.dtype:
        return f"adapter {name!r} has a bias on A, or A and B of different dtypes"
    if type(dropout) is nn.Identity:
        p = 0.0
    elif type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
    else:
        return f"adapter {name!r} uses {type(dropout).__name__} as dropout"
    if p >= 1.0 or bypass_reason(dropout):
        return f"adapter {name!r} drops everything" if p >= 1.0 else f"adapter {name!r}: {bypass_reason(dropout)}"
    scaling = module.scaling[name]
    if isinstance(scaling, Tensor):  # PEFT's compiled hot swap; folded into B so that a changed value is seen
        return LoRA(down, up * scaling, 1.0, p, None if bias is None else bias * scaling)
    return LoRA(down, up, float(scaling), p, bias)


class DoRA(NamedTuple):
    """The arguments of ``dora_linear`` behind the input."""

    weight: Tensor | Quantized4bit
    bias: Tensor | None
    lora: LoRA
    magnitude: Tensor


def uses_dora(module: Any) -> bool:
    """Whether PEFT's DoRA, and not a class derived from it, is among the active adapters of a LoRA layer."""
    variants = module.lora_variant
    return bool(variants) and any(type(variants.get(n)) is DoraLinearVariant for n in active_adapters(module))


def read_dora(module: Any) -> DoRA | str:
    """The tensors of a LoRA layer that ``uses_dora``, or the reason why its own forward must run."""
    (name, *others), base = active_adapters(module), module.base_layer
    if others:
        return f"{1 + len(others)} adapters are active, DoRA among them"
    if not is_base(base):
        return f"adapter {name!r} is DoRA and its base layer a {type(base).__name__}"
    if module.fan_in_fan_out:
        return f"adapter {name!r} is DoRA on a transposed weight"
    length = module.lora_magnitude_vector[name]
    if type(length) is not peft_dora.DoraLinearLayer:
        return f"adapter {name!r} keeps its magnitude in a {type(length).__name__}"
    if peft_dora.ENABLE_DORA_CACHING and not length.training:
        return "DoRA caching is enabled: PEFT may use norms of earlier weights"
    plain, lora = read_base(base), _read_factors(module, name)
    reason = bypass_reason(length) or tensor_reason(length.weight)
    for part in (plain, lora, reason):
        if isinstance(part, str):
            return f"adapter {name!r} is DoRA: {part}"
    assert isinstance(plain, Projection) and isinstance(lora, LoRA)
    if lora.bias is not None:
        return f"adapter {name!r} is DoRA with a bias"
    tensors = (plain.weight, lora.a, lora.b, length.weight)
    if len({t.device for t in tensors}) > 1:
        return f"adapter {name!r} is DoRA on several devices"
    if not module.training:  # PEFT asks the layer, not the dropout module
        lora = lora._replace(p=0.0)
    return DoRA(plain.weight, plain.bias, lora, length.weight)


@functools.cache
def linear_kind(cls: type[nn.Module]) -> str:
    """What linear layer modules of this very class are: "dense", "4bit", "adapted", or "" for none."""
    stock = vars(cls).get("_fuselora_stock", cls)
    if stock is nn.Linear:
        return "dense"
    if is_4bit(stock):
        return "4bit"
    return "adapted" if stock is peft_lora.Linear or class_path(stock) == PEFT_4BIT else ""


def is_base(module: nn.Module) -> bool:
    """Whether this is a linear without adapters whose weight we can read, dense or 4-bit."""
    return linear_kind(type(module)) in ("dense", "4bit")


def is_adapted(module: nn.Module) -> bool:
    """Whether this is PEFT's LoRA layer on a linear that ``is_base`` accepts, or on one that computes by itself."""
    return linear_kind(type(module)) == "adapted"


def base_linear(module: Any) -> nn.Module:
    """The linear that holds the weight: the module itself or what is below its adapters."""
    return module if is_base(module) else child(module, "base_layer")


def read_base(module: nn.Module) -> Projection | str:
    """A linear that ``is_base``."""
    return read_plain(module) if linear_kind(type(module)) == "dense" else bypass_reason(module) or read_4bit(module)


def read_projection(module: nn.Module) -> Projection | str:
    """The tensors of a linear layer in its current state, or the reason why its own forward must run."""
    if is_base(module):
        return read_base(module)
    if not is_adapted(module):
        return f"{stock_class(module).__name__} is not a plain or LoRA linear"
    reason = bypass_reason(module) or state_reason(module)
    if reason:
        return reason
    base = child(module, "base_layer")
    if not is_base(base):
        return f"its base layer is {type(base).__name__}"
    plain = read_base(base)
    names = active_adapters(module)
    if isinstance(plain, str) or not names:
        return plain
    loras = []
    for name in names:
        lora = read_adapter(module, name)
        if isinstance(lora, str):
            return lora
        dense = isinstance(plain.weight, Tensor)
        if not casts_input(module) and (not dense or lora.a.dtype != plain.weight.dtype):
            return "input casting is disabled and the adapter has another dtype"
        loras.append(lora)
    return Projection(plain.weight, plain.bias, tuple(loras))


def input_reason(x: Tensor, module: nn.Module, proj: Projection) -> str | None:
    """Why this input and this linear do not meet in one dtype, or None."""
    return dtype_reason(x, proj.weight) if isinstance(proj.weight, Tensor) else compute_reason(x, base_linear(module))


def linear_dtype(x: Tensor, module: nn.Module, proj: Projection) -> torch.dtype:
    """What the base of a linear that ``input_reason`` lets pass multiplies in; see ``base_dtype``."""
    return x.dtype if isinstance(proj.weight, Tensor) else base_dtype(x, base_linear(module))


def read_projections(x: Tensor | None, *modules: nn.Module) -> list[Projection] | str:
    """Several projections of one input; the first reason wins. ``x`` None skips the dtype check (for the report)."""
    projections, dtypes = [], set()
    for module in modules:
        proj = read_projection(module)
        if isinstance(proj, str):
            return proj
        if x is not None:
            if reason := input_reason(x, module, proj):
                return reason
            dtypes.add(linear_dtype(x, module, proj))
        projections.append(proj)
    return f"its linears compute in {' and '.join(sorted(map(str, dtypes)))}" if len(dtypes) > 1 else projections


def read_block(x: Tensor | None, *modules: nn.Module) -> list[Projection] | None | str:
    """``read_projections``, or None if the block calls its linears as modules: DoRA is among them, and each of them
    runs fused by itself.
    """
    projections = read_projections(x, *modules)
    if isinstance(projections, list):
        return projections
    linears: list[Any] = [m for m in modules if not is_base(m)]
    if not all(is_adapted(m) and is_fused(m) and m.fuse_state() is None for m in linears):
        return projections
    return None if any(uses_dora(m) for m in linears) else projections
