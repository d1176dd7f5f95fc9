"""LoftQ's start of an adapter on a 4-bit base: what quantisation took away, as far as rank r carries it.

    s B A  =  leading r singular directions of  W - dequantise(quantise(W)),  split evenly between B and A

with W from the model's files and s the adapter's scaling. The base stays as it is loaded, so this is LoftQ with one
step, the form that PEFT calls ``replace_lora_weights_loftq``; PEFT's runs on GPUs only and leaves s out, so that with
alpha = 2r it would add the difference twice.

Source: Li et al., LoftQ: LoRA-fine-tuning-aware quantization for large language models, 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fuselora.engine.errors import expected
from fuselora.engine.fingerprint import weight_files
from fuselora.engine.patch.quantized import is_4bit, read_4bit
from fuselora.engine.patch.swap import stock_class
from fuselora.kernels.nf4 import Quantized4bit, dequantize_4bit


@torch.no_grad()
def init_loftq(model: Any, base: str, cache_dir: str | None = None, adapter: str = "default") -> None:
    """Give the adapter of a PeftModel on 4-bit linears its start, in place.

    Raises:
        UserError: the base's files are no safetensors, or lack a weight under the name it has in the model.
    """
    layers = dict(_quantized_layers(model))
    for name, weight in _stored_weights(layers, base, cache_dir):
        layer = layers[name]
        projection = read_4bit(layer.base_layer)
        if isinstance(projection, str):
            raise expected("loftq_init", f"a 4-bit weight of {name} that can be read", projection, "set it to false")
        assert isinstance(projection.weight, Quantized4bit)
        lost = weight.to(layer.base_layer.weight.device).float() - dequantize_4bit(projection.weight, torch.float32)
        u, s, vh = torch.linalg.svd(lost / layer.scaling[adapter], full_matrices=False)
        rank = layer.r[adapter]
        root = s[:rank].sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * vh[:rank])
        layer.lora_B[adapter].weight.copy_(u[:, :rank] * root)


def _quantized_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and is_4bit(stock_class(module.get_base_layer())):
            yield name, module


def _stored_weights(layers: dict[str, Any], base: str, cache_dir: str | None) -> Iterator[tuple[str, Tensor]]:
    missing = dict.fromkeys(layers)
    for path in weight_files(base, cache_dir):
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
            for name in list(missing):
                if f"{name}.weight" in stored:
                    del missing[name]
                    yield name, file.get_tensor(f"{name}.weight")
    if missing:
        raise expected(
            "loftq_init",
            f"the dense weight of {next(iter(missing))} in {base}",
            "none",
            "name a dense base in safetensors",
        )
