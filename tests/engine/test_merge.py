"""Adapters merged into 4-bit bases: the formula, what is left of the model, and the drift that is reported."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.bnb import SIZES, import_bnb, qlora_model
from tests.support.models import add_lora, base_model, batch
from torch import nn

import fuselora
from fuselora.engine.kbit import linears_4bit
from fuselora.engine.patch.quantized import read_4bit
from fuselora.engine.quantized_linear import Linear4bit
from fuselora.functional import dequantize_4bit

KINDS = pytest.mark.parametrize("kind", ["bitsandbytes", "ours"])


@pytest.fixture
def build(tmp_path):
    def build(kind, family="llama", **lora):
        if kind == "bitsandbytes":
            import_bnb()
            return qlora_model(family, lora=lora)
        base_model(family, torch.bfloat16, **SIZES).save_pretrained(tmp_path)
        return add_lora(fuselora.load_4bit(str(tmp_path), progress=False), **lora)

    return build


def exact_weights(model):
    """fp64: name of the linear -> dequantised weight + scaling B A."""
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            total = dequantize_4bit(read_4bit(layer.base_layer).weight, torch.float32).double()
            for adapter in layer.active_adapters:
                a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
                total += layer.scaling[adapter] * (b @ a)
            weights[name.removeprefix("base_model.model.")] = total
    return weights


@KINDS
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_dense_weights_are_the_sum_rounded_once(build, kind, patched, capsys):
    model = build(kind, "qwen2")
    want, before = exact_weights(model), model.train()(**batch()).logits.float()
    if patched:
        fuselora.patch_model(model)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    merged = fuselora.merge_4bit(model, inputs=inputs)
    assert len(want) == 14 and not list(linears_4bit(merged.model))
    for name, weight in want.items():
        layer = merged.model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
        # One rounding to bf16, after fp32 sums whose error is far below its step.
        assert (layer.weight.double() - weight).abs().le(weight.abs() * 2**-8 * 1.01 + 1e-7).all(), name
    moved = merged.model(**batch()).logits.float() - before
    assert merged.drift_rms == pytest.approx(moved.square().mean().sqrt().item(), rel=0.3)
    assert 0 < merged.drift_rms <= merged.drift_max and merged.drift_rms < 0.02 * merged.logits_rms
    assert capsys.readouterr().out == f"merged: {merged}\n"


@KINDS
def test_merged_model_saves_and_loads_as_a_dense_one(build, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    base = fuselora.merge_4bit(build(kind)).model
    base.save_pretrained(tmp_path / "merged")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert back.dtype == torch.bfloat16 and getattr(back.config, "quantization_config", None) is None
    state = back.state_dict()
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


@KINDS
def test_requantised_keeps_the_layers_and_loses_more(build, kind):
    model = build(kind)
    want = exact_weights(model)
    dense = fuselora.merge_4bit(copy.deepcopy(model))
    quantised = fuselora.merge_4bit(model, requantize=True)
    assert quantised.drift_rms > 3 * dense.drift_rms
    layers = dict(linears_4bit(quantised.model))
    assert len(layers) == 14 and all((type(layer) is Linear4bit) == (kind == "ours") for layer in layers.values())
    for name, layer in layers.items():
        q = read_4bit(layer).weight
        assert q.absmax2 is not None and q.blocksize == 64
        error = (dequantize_4bit(q, torch.float32) - want[name]).abs()
        assert error.max() < 0.2 * want[name].abs().max()  # half the widest step of NF4 is 0.15


def test_dense_linears_and_several_adapters_merge_too(build):
    import peft

    model = build("bitsandbytes", target_modules=["q_proj", "down_proj", "lm_head"])
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    merged = fuselora.merge_4bit(model, inputs=inputs)
    assert merged.drift_rms < 0.02 * merged.logits_rms


def test_what_cannot_be_merged_changes_nothing(build):
    with pytest.raises(TypeError, match="expected a PeftModel with LoRA, got LlamaForCausalLM"):
        fuselora.merge_4bit(base_model("llama"))
    with pytest.raises(ValueError, match="expected an adapter on a 4-bit linear, got none; use merge_and_unload"):
        fuselora.merge_4bit(add_lora(base_model("llama")))
    model = build("bitsandbytes", use_dora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"q_proj: expected plain LoRA .* DoraLinearVariant"):
        fuselora.merge_4bit(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
