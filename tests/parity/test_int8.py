"""LLM.int8 bases: bitsandbytes multiplies, the low-rank part is ours; against stock and the dequantised truth. And
LoftQ's initialisation on a 4-bit base."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tests.support.bnb import SIZES, dense_twin, import_bnb
from tests.support.models import add_lora, base_model, batch
from tests.support.parity import assert_close_to_truth, run, run_truth
from torch import nn

import fuselora

pytest.importorskip("bitsandbytes")
SEEDS = range(4)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    import_bnb()
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a line for every call whose input is not fp16
    yield
    logger.setLevel(level)


def load(folder, **quantization):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**quantization)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


@pytest.fixture
def folder(tmp_path):
    base_model("llama", torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    return tmp_path


def int8_twin(model: nn.Module) -> nn.Module:
    """The same model with plain linears that hold the int8 weights times their row's scale."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if type(layer).__module__ == "bitsandbytes.nn.modules" and type(layer).__name__ == "Linear8bitLt":
            codes, scales = layer.weight.data, layer.weight.SCB
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            weight = codes.double() * scales.double()[:, None] / 127
            dense.weight = nn.Parameter(weight, requires_grad=False)
            twin.set_submodule(name, dense)
    return twin


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_low_rank_part_on_int8_bases(folder, options):
    stock = add_lora(load(folder, load_in_8bit=True), **options)
    ours = fuselora.patch_model(copy.deepcopy(stock))
    many = [batch(seed=seed, pad="right" if seed % 2 else None) for seed in SEEDS]
    twin = int8_twin(stock)
    assert_close_to_truth(run(ours, many), run_truth(twin, many), run(stock, many), torch.bfloat16)
    adapted = [row for row in fuselora.patch_report(ours).rows if row.kind == "lora_linear"]
    assert adapted and all(row.status == "fused" and not row.calls_declined for row in adapted)


def test_loftq_replaces_the_adapter_of_a_patched_model(folder, monkeypatch):
    """PEFT computes LoftQ on a GPU only; its formula runs here on the CPU, the rest is PEFT's."""
    import bitsandbytes as bnb
    import peft
    from peft.utils import loftq_utils

    def on_cpu(qweight, weight, num_bits, reduced_rank):
        residual = weight.float() - bnb.functional.dequantize_4bit(qweight.data, qweight.quant_state).float()
        parts = loftq_utils._low_rank_decomposition(residual, reduced_rank=reduced_rank)
        return parts["R"], parts["L"]

    monkeypatch.setattr(loftq_utils, "_loftq_init_new", on_cpu)
    base = load(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4")
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ours = fuselora.patch_model(peft.get_peft_model(base, lora).train(), strict=True)
    dense = base_model("llama", torch.bfloat16, **SIZES)
    truth = dense(**batch()).logits.float()

    def error():
        return (ours(**batch()).logits.float() - truth).square().mean().sqrt().item()

    plain = error()
    peft.replace_lora_weights_loftq(ours, str(folder))
    assert error() < 0.8 * plain
    stock = fuselora.unpatch_model(copy.deepcopy(ours))
    many = [batch(seed=seed) for seed in SEEDS]
    truth_of_it = run_truth(dense_twin(stock, torch.bfloat16), many)
    assert_close_to_truth(run(ours, many), truth_of_it, run(stock, many), torch.bfloat16)
