"""What one layer keeps for backward, per token: the formula of engine/memory_shapes.py, and how it compares with stock.

A layer's bytes are what a third layer adds to a model of two. Its parts keep what the formula says in every family.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.memory import activation_bytes
from tests.support.models import FAMILIES, batch, lora_model
from torch import nn

import fuselora
from fuselora.engine.memory_shapes import LayerShape, adapter_ranks, layer_shape

ROWS, SEQ, RANK = 2, 64, 4
TOKENS = ROWS * SEQ
SHAPE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 264}
NO_WINDOW = {"sliding_window": 128}  # longer than the sequence: SDPA needs no mask and repeats no keys


def model(family: str, layers: int, *, patched: bool, lora: dict[str, Any] | None = None) -> nn.Module:
    window = NO_WINDOW if "sliding_window" in FAMILIES[family] else {}
    made = lora_model(
        family, torch.bfloat16, num_hidden_layers=layers, lora={"r": RANK, **(lora or {})}, **SHAPE, **window
    )
    made.config.use_cache = False  # training has no use for it, and it copies keys and values
    return fuselora.patch_model(made, strict=True) if patched else made


def layer_bytes(family: str, *, patched: bool, **options: Any) -> int:
    """Bytes that a third layer adds to a model of two."""
    inputs = batch(ROWS, SEQ)
    totals = []
    for layers in (2, 3):
        made = model(family, layers, patched=patched, **options)
        totals.append(activation_bytes(made, lambda m=made: m(**inputs).loss))
    return totals[1] - totals[0]


def formula(family: str, policy: str = "off") -> int:
    """Bytes per token of one layer."""
    made = model(family, 1, patched=False)
    return layer_shape(made.config, adapter_ranks(made)).kept(policy, SEQ)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_formula_says(family: str) -> None:
    assert layer_bytes(family, patched=True) == formula(family) * TOKENS


def test_the_shape_of_llama_3_8b() -> None:
    """94 kB per token and layer, where stock keeps 217 kB; 37 and 17 kB by recomputing the MLP or the layer."""
    shape = LayerShape(4096, 14336, 32, 8, 128, attention_ranks=4 * 16, mlp_ranks=3 * 16)
    assert [round(shape.kept(policy, 4096) / 1000) for policy in ("off", "mlp", "full", "offload")] == [95, 37, 17, 0]
    assert shape.kept("off", 4096) - 2 * 7 * 16 - 4 * 34 == 94208


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_less_than_stock(family: str) -> None:
    """Against PEFT as users run it (fp32 adapters) and at its best (bf16 adapters)."""
    ours = layer_bytes(family, patched=True)
    stock = layer_bytes(family, patched=False)
    tuned = layer_bytes(family, patched=False, lora={"autocast_adapter_dtype": False})
    assert ours / stock < 0.43 and ours / tuned < 0.65, f"{ours / stock:.3f}, {ours / tuned:.3f}"


def test_dropout_keeps_a_seed_per_adapter_and_no_mask() -> None:
    ours = layer_bytes("llama", patched=True, lora={"lora_dropout": 0.1})
    assert ours == formula("llama") * TOKENS + 7 * 8
    assert layer_bytes("llama", patched=False, lora={"lora_dropout": 0.1}) > 3.5 * ours


def test_adapters_on_some_projections_keep_only_their_share() -> None:
    """Without an adapter on them, k, o, gate, up and down keep no X A^T; their frozen weights need no input."""
    ours = layer_bytes("llama", patched=True, lora={"target_modules": ["q_proj", "v_proj"]})
    assert ours <= (formula("llama") - 2 * 5 * RANK) * TOKENS


def test_the_loss_keeps_no_logits() -> None:
    """What the head and the loss keep does not grow with the vocabulary."""
    inputs = batch(ROWS, SEQ)
    sizes = []
    for vocab in (131, 4001):
        made = fuselora.patch_model(lora_model("llama", torch.bfloat16, vocab_size=vocab), strict=True)
        sizes.append(activation_bytes(made, lambda m=made: m(**inputs).loss))
    assert sizes[0] == sizes[1]
