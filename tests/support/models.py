"""Tiny random models of the families that patch_model fuses, and batches for them. No dimension is a power of two.

Weights are drawn so that every part matters: linears keep the scale of their input, norms and biases are not at their
neutral initial value, and lora_B is not zero, else half of the adapter gradients would be.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB, HIDDEN, INTER, HEADS, KV_HEADS = 131, 48, 88, 6, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 12}
WINDOW = {"sliding_window": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": {**HEAD, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        **HEAD,
        **WINDOW,
        "query_pre_attn_scalar": 12,
        "attn_implementation": "eager",  # SDPA has no soft-capping; transformers 5.17 would choose it all the same
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {**HEAD, **WINDOW, "query_pre_attn_scalar": 12, "sliding_window_pattern": 2},
    "phi3": {},
    "granite": {
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
    },
    "olmo2": {},
}


def base_model(family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A stock causal LM. ``config`` overrides the family's sizes and options."""
    settings = {**SIZES, **FAMILIES.get(family, {}), **config}
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation=attention)
    randomize(model)
    return double_parameters(model) if dtype == torch.float64 else model.to(dtype)


def double_parameters(model: nn.Module) -> nn.Module:
    """fp64 in place, but not the buffers: a rotary table is an input of the computation, not a result."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every parameter anew: see the module docstring."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif parameter.ndim == 1:  # a norm's weight, around 1, or around 0 where the module adds 1
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif "embed" in name:
            parameter.normal_(std=0.5)
        else:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)


@torch.no_grad()
def fill_adapters(model: nn.Module, seed: int = 1, adapter: str = "default") -> None:
    """Give lora_B, and the A of embeddings, which start at zero, values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if adapter in name and ("lora_B" in name or "lora_embedding_A" in name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def add_lora(model: nn.Module, **lora: Any) -> PeftModel:
    """PEFT's LoRA on all linears unless ``lora`` says otherwise, with random lora_B."""
    cast = lora.pop("autocast_adapter_dtype", True)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    peft_model = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=cast)
    fill_adapters(peft_model)
    return peft_model.train()


def lora_model(
    family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, lora: dict | None = None, **config: Any
) -> PeftModel:
    """``base_model`` with ``add_lora``, in training mode."""
    return add_lora(base_model(family, dtype, seed=seed, **config), **(lora or {}))


def batch(rows: int = 2, length: int = 13, *, seed: int = 7, pad: str | None = None) -> dict[str, Tensor]:
    """Random tokens with labels, a third of them ignored. ``pad`` ("right" or "left") pads the last row by four."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.33, -100)
    if pad is None:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    where = slice(length - 4, None) if pad == "right" else slice(0, 4)
    mask[-1, where] = 0
    return {"input_ids": ids * mask, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def packed_batch(lengths: tuple[int, ...] = (5, 9, 4), *, seed: int = 7) -> dict[str, Tensor]:
    """Several sequences in one row, kept apart by restarting position_ids; stock looks at them without a cache only."""
    made = batch(1, sum(lengths), seed=seed)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = made["labels"].masked_fill(positions == 0, -100)
    return {**made, "labels": labels, "position_ids": positions, "use_cache": False}
