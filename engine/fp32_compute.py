"""Logits of a model as its weights stand, computed in fp32 without an fp32 copy of the model.

A module's own weights are fp32 while it runs and as they were afterwards (16-bit values are exact in fp32), so that at
any time one module is in fp32; so is a 4-bit weight. What remains in a comparison of two such logits is the
difference of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fuselora.engine.kbit import linears_4bit
from fuselora.engine.patch.quantized import read_4bit
from fuselora.kernels.nf4 import Quantized4bit, dequantize_4bit

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
    for layer in layers:
        layer.forward = functools.partial(_linear_4bit, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for handle in handles:
            handle.remove()


def _linear_4bit(layer: Any, x: Tensor) -> Tensor:
    """On the weight dequantised to fp32; bitsandbytes' own code for CPUs misreads rows that are no whole blocks."""
    projection = read_4bit(layer)
    assert not isinstance(projection, str) and isinstance(projection.weight, Quantized4bit), projection
    bias = None if projection.bias is None else projection.bias.float()
    return nn.functional.linear(x.float(), dequantize_4bit(projection.weight, torch.float32), bias)


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
