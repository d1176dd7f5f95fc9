"""Logits of a model as its weights stand, computed in fp32 without an fp32 copy of the model.

A module's own weights are fp32 while it runs and as they were afterwards (16-bit values are exact in fp32), so that at
any time one module is in fp32; 4-bit linears compute in fp32. What remains in a comparison of two such logits is the
difference of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.kbit import linears_4bit

HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def fp32_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Logits (batch, length, vocabulary) in fp32, in evaluation mode; the model is left as it was."""
    training = model.training
    with computing_in_fp32(model):
        logits = model.eval()(input_ids=input_ids, use_cache=False).logits.float()
    model.train(training)
    return logits


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, calls of ``model`` compute in fp32 from weights in any dtype."""
    handles, kept = [], {}
    for module in model.modules():
        if any(p.dtype in HALF for p in module.parameters(recurse=False)):
            handles += [
                module.register_forward_pre_hook(_widen(kept)),
                module.register_forward_hook(_narrow(kept), always_call=True),
            ]
    layers = [layer for _, layer in linears_4bit(model)]
    dtypes = [layer.compute_dtype for layer in layers]
    for layer in layers:
        layer.compute_dtype = torch.float32
    try:
        yield
    finally:
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.compute_dtype = dtype
        for handle in handles:
            handle.remove()


def _widen(kept: dict[nn.Parameter, Tensor]) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in HALF:
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    return hook


def _narrow(kept: dict[nn.Parameter, Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    return hook
