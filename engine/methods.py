"""What is trained: an adapter (lora), some layers (freeze) or every weight (full).

    lora     PEFT's adapters on a frozen base; see adapters.py
    freeze   parameters of the last n layers (freeze_trainable_layers: n), or the first ones (-n), or of the named
             parts of those layers (freeze_trainable_modules), and named modules outside them (freeze_extra_modules)
    full     all parameters

With ``bf16`` the trained weights of freeze and full are kept in fp32 and computed with in bfloat16 (autocast), so that
updates below bfloat16's step of 2^-8 aren't lost; frozen ones are in bfloat16. ``pure_bf16`` keeps everything in
bfloat16. The keys and what they select are LLaMA-Factory's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from fuselora.engine.adapters import attach_adapter
from fuselora.engine.config import Config
from fuselora.engine.errors import expected

LAYER = re.compile(r"^(?P<stack>(?:.+\.)?layers|(?:.+\.)?h|(?:.+\.)?blocks)\.(?P<index>\d+)\.(?P<part>[^.]+)")


def prepare_method(model: Any, base: str, config: Config) -> Any:
    """Make ``model`` train what ``finetuning_type`` says; a new PeftModel around it for lora, else the same object."""
    if config.finetuning_type == "lora":
        return attach_adapter(model, base, config)
    if config.finetuning_type == "full":
        model.requires_grad_(True)
    else:
        freeze_all_but(model, config)
    if not config.pure_bf16:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.bf16:
        autocast_forward(model, torch.bfloat16)
    return model


def freeze_all_but(model: nn.Module, config: Config) -> None:
    """Leave ``requires_grad`` on the parameters that the freeze keys name.

    Raises:
        UserError: the model has no numbered layers, or a key names a part that it doesn't have.
    """
    count, parts, outside = model_parts(model)
    if not count:
        raise expected(
            "finetuning_type", "a model with numbered layers for freeze", type(model).__name__, "use lora or full"
        )
    n = config.freeze_trainable_layers
    indices = range(max(0, count - n), count) if n > 0 else range(min(-n, count))
    wanted = set(config.freeze_trainable_modules)
    _check_names("freeze_trainable_modules", wanted - {"all"}, parts)
    _check_names("freeze_extra_modules", set(config.freeze_extra_modules), outside)
    for name, parameter in model.named_parameters():
        layer = LAYER.match(name)
        if layer:
            trained = int(layer["index"]) in indices and ("all" in wanted or layer["part"] in wanted)
        else:
            trained = bool(set(config.freeze_extra_modules) & set(name.split(".")))
        parameter.requires_grad_(trained)


def model_parts(model: nn.Module) -> tuple[int, set[str], set[str]]:
    """(number of layers, names of the parts of a layer, names of the modules with parameters outside the layers)."""
    count, parts, outside = 0, set(), set()
    for name, _ in model.named_parameters(remove_duplicate=False):
        layer = LAYER.match(name)
        if layer:
            count = max(count, int(layer["index"]) + 1)
            parts.add(layer["part"])
        else:
            outside.add(name.split(".")[-2])
    return count, parts, outside


def _check_names(key: str, wanted: set[str], there: set[str]) -> None:
    for name in sorted(wanted - there):
        raise expected(key, "names among " + ", ".join(sorted(there)), repr(name), "correct the name")


def autocast_forward(model: nn.Module, dtype: torch.dtype) -> None:
    """Every call of ``model`` under autocast to ``dtype``, by hooks, so that whoever calls it needn't know."""
    open_contexts: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        context = torch.autocast(next(module.parameters()).device.type, dtype)
        context.__enter__()
        open_contexts.append(context)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def trainable_summary(model: nn.Module) -> str:
    """How many weights are trained, and which: one line per kind of module, layers counted together."""
    groups: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    total = trained = 0
    for name, parameter in model.named_parameters():
        size = _weights(parameter)
        total += size
        if parameter.requires_grad:
            trained += size
            group = groups[_kind(name)]
            group[0] += 1
            group[1] += parameter.numel()
    lines = [f"trained weights: {trained:,} of {total:,} ({trained / max(total, 1):.2%})"]
    width = max(map(len, groups), default=0)
    lines += [f"  {kind:{width}}  {size:>14,} in {tensors} tensors" for kind, (tensors, size) in groups.items()]
    return "\n".join(lines)


def _weights(parameter: nn.Parameter) -> int:
    """Elements; packed 4-bit weights count as what they stand for."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else shape.numel()


def _kind(name: str) -> str:
    """A parameter's module without its layer's number, adapter name and PEFT's prefixes."""
    path = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
    path = re.sub(r"\.(lora|modules_to_save)(_\w+)?(\.[^.]+)?(\.weight|\.bias)?$", r" \1", path)
    return re.sub(r"\.(weight|bias)$", "", path.removeprefix("model."))
