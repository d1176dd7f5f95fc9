"""What one layer keeps for backward, per token: what the kernels' docstrings say, and how it compares with stock.

With b bytes per element, K = hidden size, I = intermediate size, q = heads x head_dim, v = kv heads x head_dim:

    b (2 K)         inputs of the two norms in front of attention and MLP (the residual stream)
    b (2 K)         their outputs, which are the inputs of q, k, v and of gate, up
    b (q + 2 v)     rotated q, k, and v, kept by the attention function
    b (q)           its output, which is also the input of o
    b (2 I)         gate and up
    b (n r)         X A^T of n adapters
    4 (2 + heads)   fp32: 1 / rms of the norms, log-sum-exp of the attention

Gemma 2 and 3 have two norms more (+ 2 K). OLMo 2 has its two norms behind the branches: they keep the branches, and the
projections keep the stream, 4 K in all. Norms on q and k keep their inputs (+ q + v). Eager attention keeps three
matrices of scores per head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.memory import activation_bytes
from tests.support.models import FAMILIES, batch, lora_model
from torch import nn

import fuselora

ROWS, SEQ, RANK = 2, 64, 4
TOKENS = ROWS * SEQ
SHAPE: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 264}
NO_WINDOW = {"sliding_window": 128}  # longer than the sequence: SDPA needs no mask and repeats no keys


def model(family: str, layers: int, *, patched: bool, lora: dict[str, Any] | None = None) -> nn.Module:
    window = NO_WINDOW if "sliding_window" in FAMILIES[family] else {}
    made = lora_model(
        family, torch.bfloat16, num_hidden_layers=layers, lora={"r": RANK, **(lora or {})}, **SHAPE, **window
    )
    return fuselora.patch_model(made, strict=True) if patched else made


def layer_bytes(family: str, *, patched: bool, **options: Any) -> int:
    """Bytes that a third layer adds to a model of two."""
    inputs = batch(ROWS, SEQ)
    totals = []
    for layers in (2, 3):
        made = model(family, layers, patched=patched, **options)
        totals.append(activation_bytes(made, lambda m=made: m(**inputs).loss))
    return totals[1] - totals[0]


def formula(family: str, b: int = 2) -> int:
    """Bytes per token of one layer, from the module docstring."""
    config = model(family, 1, patched=False).config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, inter, q, v = config.hidden_size, config.intermediate_size, heads * head_dim, kv_heads * head_dim
    adapters = 4 if family == "phi3" else 7
    elements = 4 * hidden + q + 2 * v + q + 2 * inter + adapters * RANK
    scalars = 2 + heads
    if family in ("gemma2", "gemma3_text"):
        elements, scalars = elements + 2 * hidden, scalars + 2
    if family in ("qwen3", "gemma3_text"):
        elements, scalars = elements + q + v, scalars + heads + kv_heads
    if family == "olmo2":
        elements, scalars = elements + q + v, scalars + 2
    if family == "gemma2":  # eager: keys and values repeated to q; scores capped, soft-maxed in fp32, and cast; no lse
        elements, scalars = elements + 2 * (q - v) + 2 * heads * SEQ, scalars + heads * SEQ - heads
    return b * elements + 4 * scalars


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_the_formula_says(family: str) -> None:
    assert layer_bytes(family, patched=True) == formula(family) * TOKENS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_less_than_stock(family: str) -> None:
    """Against PEFT as users run it (fp32 adapters) and at its best (bf16 adapters); gemma2 pays for eager attention."""
    ours = layer_bytes(family, patched=True)
    stock = layer_bytes(family, patched=False)
    tuned = layer_bytes(family, patched=False, lora={"autocast_adapter_dtype": False})
    limits = {"gemma2": (0.62, 0.85), "phi3": (0.48, 0.75)}.get(family, (0.43, 0.65))
    assert ours / stock < limits[0] and ours / tuned < limits[1], f"{ours / stock:.3f}, {ours / tuned:.3f}"


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
