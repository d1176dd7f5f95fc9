"""Models with DoRA against stock PEFT: losses, logits and every gradient, with fp32 adapters and with cast ones."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.parity.test_dropout import P, check_with_injected_masks
from tests.support.bnb import SIZES, dense_twin, qlora_model, quantize_linears
from tests.support.models import add_lora, base_model, batch, lora_model
from tests.support.parity import assert_all_fused, assert_close_to_truth, run, run_truth
from torch import nn

import fuselora

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def dora_model(family: str, dtype: torch.dtype, **lora: object) -> nn.Module:
    """Adapters are filled after the magnitudes are drawn from the base, so that these differ from the norms."""
    return lora_model(family, dtype, lora={"use_dora": True, **lora})


@DTYPES
@pytest.mark.parametrize("cast", [True, False], ids=["fp32-adapters", "cast-adapters"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parity(family: str, cast: bool, dtype: torch.dtype) -> None:
    """Qwen 2 has biases, which DoRA does not scale."""
    stock = dora_model(family, dtype, autocast_adapter_dtype=cast)
    ours = fuselora.patch_model(copy.deepcopy(stock))
    inputs = [batch(seed=seed, pad="right") for seed in range(4)]
    assert_close_to_truth(run(ours, inputs), run_truth(stock, inputs), run(stock, inputs), dtype)
    assert_all_fused(ours)


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parity_with_the_same_dropout_masks(family: str, dtype: torch.dtype) -> None:
    ours = check_with_injected_masks(dora_model(family, dtype, lora_dropout=P), dtype)
    assert_all_fused(ours)


def test_trained_biases() -> None:
    ours = check_with_injected_masks(dora_model("qwen2", torch.float32, bias="all", lora_dropout=P), torch.float32)
    assert_all_fused(ours)


@pytest.mark.parametrize("dropout", [0.0, P])
def test_verify(dropout: float) -> None:
    model = dora_model("llama", torch.bfloat16, lora_dropout=dropout)
    result = fuselora.verify(fuselora.patch_model(model), batch())
    assert result.ok, result


@DTYPES
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parity_on_4bit_bases(family: str, dtype: torch.dtype) -> None:
    stock = qlora_model(family, dtype, lora={"use_dora": True})
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    inputs = [batch(seed=seed, pad="right") for seed in range(4)]
    truth = run_truth(dense_twin(stock, dtype), inputs)
    assert_close_to_truth(run(ours, inputs), truth, run(stock, inputs), dtype)
    assert_all_fused(ours)


@pytest.mark.parametrize("dropout", [0.0, P])
def test_verify_on_a_4bit_base(dropout: float) -> None:
    model = qlora_model("llama", torch.bfloat16, lora={"use_dora": True, "lora_dropout": dropout})
    result = fuselora.verify(fuselora.patch_model(model, strict=True), batch())
    assert result.ok, result


@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_base_that_peft_prepared(autocast: bool) -> None:
    """fp32 around a bf16 base: fused where autocast rounds the adapter too, stock and reported where not."""
    peft = pytest.importorskip("peft")
    base = quantize_linears(base_model("llama", torch.bfloat16, **SIZES))
    stock = add_lora(peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), use_dora=True)
    ours = fuselora.patch_model(copy.deepcopy(stock))
    inputs = [batch(seed=seed) for seed in range(4)]
    truth = run_truth(dense_twin(stock, torch.bfloat16), inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = run(ours, inputs), run(stock, inputs)
    assert_close_to_truth(mine, truth, theirs, torch.float32)
    reasons = " ".join(row.reason for row in fuselora.patch_report(ours).unfused())
    assert ("DoRA's fp32 part on a base that multiplies in torch.bfloat16" in reasons) != autocast
