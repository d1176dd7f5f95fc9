"""The parity line: the export is as close as its format allows, closer than or as close as stock's merge, and the line
says how close that is. Truth is base and adapter in fp64.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.support.models import base_model

from fuselora.engine import export_parity as parity
from fuselora.engine.adapters import merge_in_fp32
from fuselora.engine.fp32_compute import fp32_logits

SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
IDS = torch.randint(3, 160, (2, 32), generator=torch.Generator().manual_seed(5))
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3"]


def trained(family, dtype=torch.float32):
    """A bf16 base with an adapter, of ``dtype``, after ten steps of training."""
    sizes = SIZES if family in ("qwen3", "gemma2") else {k: v for k, v in SIZES.items() if k != "head_dim"}
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base_model(family, torch.bfloat16, **sizes), config)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=5e-3)
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in adapters:
        p.data = p.data.to(dtype)
    return model.eval()


@torch.no_grad()
def fp64_logits(model):
    return copy.deepcopy(model).double()(input_ids=IDS, use_cache=False).logits


def rounded_once(model):
    """Base and adapter in one fp64 weight each, rounded to bf16: nothing that rounds weights one by one is closer."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for layer in merged.modules():
            if isinstance(layer, LoraLayer):
                a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
                total = layer.base_layer.weight.double() + layer.scaling["default"] * (b @ a)
                layer.base_layer.weight.data = total.bfloat16()
    return merged.unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 adapter", "bf16 adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_reaches_the_floor_of_the_format(family, dtype):
    """Stock PEFT's merge reaches it with fp32 adapters; with bf16 ones it rounds B A first."""
    model = trained(family, dtype)
    truth = fp64_logits(model)
    models = (merge_in_fp32(copy.deepcopy(model)), copy.deepcopy(model).merge_and_unload(), rounded_once(model))
    ours, stock, floor = (parity.relative_rms(fp64_logits(m) - truth, truth) for m in models)
    assert ours <= 1.01 * floor and 0 < floor < 5e-3, (ours, stock, floor)
    if dtype == torch.float32:
        assert ours <= 1.0001 * stock, (ours, stock)
    different = sum((a != b).sum().item() for a, b in zip(models[1].parameters(), models[2].parameters(), strict=True))
    assert (different > 1000) == (dtype == torch.bfloat16), different


@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_is_known_without_the_adapter(family):
    """The line's floor is made by random errors; what rounding makes is within a fifth of it."""
    model = trained(family)
    before, names = fp32_logits(model, IDS), parity.rounded_modules(model, torch.bfloat16)
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    merged = merge_in_fp32(model)
    assert adapted == {name for name, _ in merged.named_modules() if name in names}
    weights = {name: p.clone() for name, p in merged.named_parameters()}
    found = parity.compare(merged, IDS, before, 1.0, names)
    assert found.ok and found.rms == pytest.approx(found.floor, rel=0.2), found
    assert all(torch.equal(p, weights[name]) for name, p in merged.named_parameters())
    assert f"rounding weights to bfloat16 makes {found.floor:.2e} (rms)" in str(found)


@pytest.mark.parametrize("wrong", ["one layer without its adapter", "scaling off by 1 %"])
def test_a_merge_that_is_slightly_wrong_fails(wrong):
    """The second by less than computing in bf16 makes, which would hide it."""
    model = trained("llama")
    before, names = fp32_logits(model, IDS), parity.rounded_modules(model, torch.bfloat16)
    computing = parity.relative_rms(parity.logits_in(model, IDS, torch.bfloat16) - before, before)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers[:1] if wrong.startswith("one") else layers:
        layer.scaling["default"] *= 0.0 if wrong.startswith("one") else 1.01
    found = parity.compare(merge_in_fp32(model), IDS, before, computing, names)
    assert not found.ok and (wrong.startswith("one") or found.rms < computing), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_unit_is_the_distance_to_the_next_number(dtype):
    x = torch.tensor([1.0, 1.5, -3.0, 1e-3, 6e-8, 0.0], dtype=dtype)
    up = torch.nextafter(x.abs(), torch.full_like(x, torch.inf)).float() - x.abs().float()
    torch.testing.assert_close(parity.unit(x), up, rtol=0, atol=0)
