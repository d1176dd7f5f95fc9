"""Tiny models on bitsandbytes' 4-bit linears, and their dense twins."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from tests.support.models import add_lora, base_model
from torch import nn

from fuselora.functional import dequantize_4bit

# Multiples of the block: bitsandbytes' CPU path reads wrong scales where a block crosses two rows.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def import_bnb() -> Any:
    import pytest

    logging.disable(logging.WARNING)  # it warns that an optional package is not installed
    bnb = pytest.importorskip("bitsandbytes")
    logging.disable(logging.NOTSET)
    return bnb


def quantize_linears(model: nn.Module, *, compute: torch.dtype | None = torch.bfloat16, **options: Any) -> nn.Module:
    """Every linear but the head becomes a 4-bit one, as transformers does it while loading."""
    bnb = import_bnb()
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name == "lm_head":
            continue
        quantised = bnb.nn.Linear4bit(
            *(linear.in_features, linear.out_features, linear.bias is not None, compute),
            **{"compress_statistics": True, "quant_type": "nf4", **options},
        )
        data = linear.weight.data
        keywords = {
            k: getattr(quantised.weight, k) for k in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        quantised.weight = bnb.nn.Params4bit(data, requires_grad=False, module=quantised, **keywords).to("cpu")
        if linear.bias is not None:
            quantised.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantised)
    model.is_loaded_in_4bit = True
    return model


def qlora_model(
    family: str, dtype: torch.dtype = torch.bfloat16, *, lora: dict | None = None, **options: Any
) -> nn.Module:
    """A tiny model with 4-bit linears and LoRA on all of them, in training mode."""
    head = {} if family in ("llama", "mistral", "qwen2") else {"head_dim": 16}
    base = quantize_linears(base_model(family, dtype, **SIZES, **head), **{"compute": dtype, **options})
    return add_lora(base, **(lora or {}))


def dense_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model with its 4-bit weights dequantised to ``dtype`` in plain linears."""
    import peft

    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if type(layer).__name__ != "Linear4bit" or isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        from fuselora.engine.patch.quantized import read_4bit

        weight, bias, _ = read_4bit(layer)
        dense = nn.Linear(layer.in_features, layer.out_features, bias is not None, dtype=dtype)
        dense.weight = nn.Parameter(dequantize_4bit(weight, dtype), requires_grad=False)
        dense.bias = None if bias is None else nn.Parameter(bias.data.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, dense)
    return twin
