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

import fuselora
from fuselora.engine.kbit import dequantize_linears, frozen_tensors, linears_8bit
from fuselora.engine.verify import verify

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


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_low_rank_part_on_int8_bases(folder, options):
    stock = add_lora(load(folder, load_in_8bit=True), **options)
    ours = fuselora.patch_model(copy.deepcopy(stock))
    many = [batch(seed=seed, pad="right" if seed % 2 else None) for seed in SEEDS]
    twin = dequantize_linears(copy.deepcopy(stock), torch.float64)
    assert_close_to_truth(run(ours, many), run_truth(twin, many), run(stock, many), torch.bfloat16)
    adapted = [row for row in fuselora.patch_report(ours).rows if row.kind == "lora_linear"]
    assert adapted and all(row.status == "fused" and not row.calls_declined for row in adapted)


def test_verify_takes_int8_bases_and_leaves_one_set_of_codes(folder):
    ours = fuselora.patch_model(add_lora(load(folder, load_in_8bit=True)))
    for _ in range(2):  # the first call moves the scales
        result = verify(ours, batch())
        assert result.ok and len(result.rows) == 28 and not result.zero_gradients, str(result)
        assert result.dtype is torch.bfloat16 and 1e-4 < result.pooled_stock < 0.1
        layers = [layer for _, layer in linears_8bit(ours)]
        assert len(layers) == 14
        assert all(layer.weight.data_ptr() == layer.state.CB.data_ptr() for layer in layers)
    scales = layers[0].state.SCB
    assert frozen_tensors(ours)[id(scales)] is scales
    name, weight = next((n, p) for n, p in ours.named_parameters() if "k_proj.lora_B" in n)
    weight.register_hook(lambda grad: grad * 1.1)
    assert [row.name for row in verify(ours, batch()).rows if not row.ok] == [name]


def test_dequantised_weights_are_half_a_code_from_the_file(folder):
    base = load(folder, load_in_8bit=True)
    layer = base.model.layers[0].mlp.up_proj
    exact = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    dense = base_model("llama", torch.bfloat16, **SIZES).model.layers[0].mlp.up_proj.weight
    half_step = layer.weight.SCB.double()[:, None] / 254
    assert ((exact - dense.double()).abs() <= 1.01 * half_step).all()
    twin = dequantize_linears(base, torch.bfloat16).model.layers[0].mlp.up_proj
    assert torch.equal(twin.weight, exact.bfloat16()) and type(twin) is torch.nn.Linear


def test_weights_that_are_not_codes_yet_are_named():
    import bitsandbytes as bnb

    model = torch.nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    with pytest.raises(ValueError, match="0: expected int8 codes with their scales, got torch.float32"):
        dequantize_linears(model, torch.float32)


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
