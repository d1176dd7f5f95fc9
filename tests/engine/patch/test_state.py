"""PEFT's state changes on twins: after each, a patched model gives the outputs and gradients of stock.

The models are in fp64 so that the comparison is tight (1e-9): what is tested is which computation runs, not how it
rounds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.support.models import add_lora, base_model, batch, fill_adapters
from tests.support.parity import StayDouble, assert_same_results, run
from tests.support.twins import SMALL, Twins, add_adapter, small_twins, twins_of
from torch import nn

import fuselora


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def test_merge_and_unmerge() -> None:
    twins = small_twins()
    before = twins.check()
    twins.both(lambda m: m.merge_adapter())
    merged = twins.check()
    assert not twins.reasons()
    assert all(g is None for g in merged.grads.values())
    twins.both(lambda m: m.unmerge_adapter())
    after = twins.check()
    torch.testing.assert_close(merged.logits, before.logits)
    torch.testing.assert_close(after.logits, before.logits)


def test_disable_adapter() -> None:
    twins = small_twins()
    before = twins.check()
    with twins.stock.disable_adapter(), twins.ours.disable_adapter():
        assert not twins.reasons()
        disabled = twins.check()
    assert (disabled.logits - before.logits).abs().max() > 0.1
    assert torch.equal(twins.check().logits, before.logits)


def test_disable_while_merged() -> None:
    """PEFT unmerges inside forward: the weights themselves must come back, in ours as in stock."""
    twins = small_twins()
    before = twins.check()
    twins.both(lambda m: m.merge_adapter())
    with twins.stock.disable_adapter(), twins.ours.disable_adapter():
        twins.check()
    assert not any(layer.merged for layer in lora_layers(twins.ours))
    torch.testing.assert_close(twins.check().logits, before.logits)


def test_switch_between_two_adapters() -> None:
    twins = small_twins()
    twins.both(add_adapter("other"))
    seen = []
    for name in ("other", "default", "other"):
        twins.both(lambda m, name=name: m.set_adapter(name))
        seen.append(twins.check().logits)
        assert not twins.reasons()
    assert not torch.allclose(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_two_active_adapters() -> None:
    twins = small_twins()
    twins.both(add_adapter("other"))
    twins.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    result = twins.check()
    assert all(g is not None for g in result.grads.values()) and len(result.grads) == 4 * len(lora_layers(twins.ours))
    assert not twins.reasons()
    assert all(row.status == "fused" for kind in ("attention", "mlp", "lora_linear") for row in twins.rows(kind=kind))
    twins.both(lambda m: m.set_adapter("other"))
    twins.check()


def test_two_active_adapters_merged() -> None:
    twins = small_twins()
    twins.both(add_adapter("other"))
    twins.both(lambda m: m.merge_adapter(["default", "other"]))
    twins.check()
    twins.both(lambda m: m.unmerge_adapter())
    twins.check()


def test_delete_adapter() -> None:
    twins = small_twins()
    before = twins.check()
    twins.both(add_adapter("other"))
    twins.both(lambda m: m.set_adapter("other"))
    twins.check()
    twins.both(lambda m: m.delete_adapter("other"))
    twins.both(lambda m: m.set_adapter("default"))
    assert torch.equal(twins.check().logits, before.logits)
    assert not twins.reasons()


def test_deleting_the_only_adapter_leaves_the_base() -> None:
    twins = small_twins()
    twins.both(lambda m: m.delete_adapter("default"))
    Twins(twins.stock.base_model.model, twins.ours.base_model.model).check()  # a PeftModel can't run without adapter


def test_layers_added_after_patching_are_reported_and_patched_by_a_second_call() -> None:
    twins = small_twins(lora={"target_modules": ["q_proj"]})
    twins.both(add_adapter("other", target_modules=["o_proj", "down_proj"]))
    twins.both(lambda m: m.set_adapter("other"))
    twins.check()
    new = [row for row in twins.rows(status="stock") if row.cls == "Linear"]
    assert sorted(row.module.rpartition(".")[2] for row in new) == ["down_proj", "o_proj"]
    assert {row.reason for row in new} == {"not patched: disabled, or made after patch_model"}
    fuselora.patch_model(twins.ours, strict=True)
    twins.check()
    assert not twins.reasons()


def test_adapters_added_to_a_patched_base_model() -> None:
    """patch_model first, get_peft_model second."""
    stock = base_model("llama", torch.float64, **SMALL)
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    torch.manual_seed(2)
    stock = add_lora(stock, target_modules=["q_proj", "lm_head", "gate_proj"])
    torch.manual_seed(2)
    twins = Twins(stock, add_lora(ours, target_modules=["q_proj", "lm_head", "gate_proj"]))
    twins.check()
    fuselora.patch_model(twins.ours)
    twins.check()


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_unload(how: str) -> None:
    twins = small_twins()
    before = twins.check()
    twins = Twins(getattr(twins.stock, how)(), getattr(twins.ours, how)())
    result = twins.check()
    assert not lora_layers(twins.ours) and not twins.reasons()
    assert torch.allclose(result.logits, before.logits) == (how == "merge_and_unload")
    assert twins.ours.state_dict().keys() == twins.stock.state_dict().keys()


def saved_adapter(folder: Path, **lora: Any) -> str:
    model = add_lora(base_model("llama", torch.float64, seed=9, **SMALL), **lora)
    fill_adapters(model, seed=21)
    model.save_pretrained(folder)
    return str(folder)


def test_load_adapter(tmp_path: Path) -> None:
    path = saved_adapter(tmp_path, r=5)
    twins = small_twins()
    before = twins.check()
    twins.both(lambda m: m.load_adapter(path, "loaded", is_trainable=True))
    assert torch.equal(twins.check().logits, before.logits)
    twins.both(lambda m: m.set_adapter("loaded"))
    assert not torch.allclose(twins.check().logits, before.logits)
    assert not twins.reasons()


def test_hotswap(tmp_path: Path) -> None:
    path = saved_adapter(tmp_path, lora_alpha=24)
    twins = small_twins()
    before = twins.check()
    twins.both(lambda m: hotswap_adapter(m, path, adapter_name="default"))
    assert not torch.allclose(twins.check().logits, before.logits)
    assert not twins.reasons()


@pytest.mark.parametrize("prepare_first", [True, False], ids=["prepared-before-patching", "prepared-after-patching"])
def test_hotswap_into_padded_ranks_with_tensor_scaling(tmp_path: Path, prepare_first: bool) -> None:
    """Compiled hot swap pads A and B to one rank, makes scalings tensors and writes new values into them."""
    path = saved_adapter(tmp_path, r=7, lora_alpha=24)

    def prepare(model: PeftModel) -> None:
        prepare_model_for_compiled_hotswap(model, target_rank=8)

    stock = add_lora(base_model("llama", torch.float64, **SMALL))
    if prepare_first:
        prepare(stock)
    twins = twins_of(stock, strict=True)
    if not prepare_first:
        twins.both(prepare)
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in lora_layers(twins.ours))
    before = twins.check()
    twins.both(lambda m: hotswap_adapter(m, path, adapter_name="default"))
    assert not torch.allclose(twins.check().logits, before.logits)
    assert not twins.reasons()


def test_changed_scales() -> None:
    twins = small_twins()
    seen = [twins.check().logits]
    for change in (
        lambda layer: layer.set_scale("default", 3.0),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.scaling.update(default=0.0),
        lambda layer: layer.unscale_layer(),
    ):
        twins.both(lambda m, change=change: [change(layer) for layer in lora_layers(m)])
        seen.append(twins.check().logits)
        assert not torch.allclose(seen[-1], seen[-2])
    assert torch.equal(seen[-1], seen[0]) and not twins.reasons()


def test_values_written_in_place() -> None:
    """An optimizer, a loader or an initialiser writes A and B: nothing of them may have been kept."""
    twins = small_twins()
    before = twins.check()

    @torch.no_grad()
    def negate(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.neg_() if parameter.requires_grad else parameter.mul_(0.9)

    twins.both(negate)
    assert not torch.allclose(twins.check().logits, before.logits)


def test_mixed_batch_of_adapter_names() -> None:
    twins = small_twins()
    twins.both(add_adapter("other"))
    twins.both(lambda m: m.eval())
    ids = batch(3)["input_ids"]
    with torch.no_grad():
        twins.check({"input_ids": ids, "adapter_names": ["other", "__base__", "default"]})
    twins.check({"input_ids": ids})


def test_training_and_eval_and_frozen_adapters() -> None:
    twins = small_twins()
    twins.both(lambda m: m.eval())
    twins.check()
    twins.both(lambda m: m.requires_grad_(False))
    twins.check()
    twins.both(lambda m: [p.requires_grad_("lora_A" in n) for n, p in m.named_parameters()])
    assert len(twins.check().grads) == 7
    twins.both(lambda m: [p.requires_grad_("lora_B" in n) for n, p in m.named_parameters()])
    assert len(twins.check().grads) == 7


def test_moving_between_dtypes() -> None:
    twins = small_twins()
    twins.both(lambda m: m.float())
    assert_same_results(run(twins.ours, batch()), run(twins.stock, batch()), rtol=1e-4)
    twins.both(lambda m: m.bfloat16())
    assert_same_results(run(twins.ours, batch()), run(twins.stock, batch()), rtol=0.05)


def test_grads_accumulate_over_two_backwards() -> None:
    twins = small_twins()

    def accumulate(model: nn.Module) -> None:
        with StayDouble():
            for seed in (1, 2):
                (model(**batch(seed=seed)).loss / 2).backward()

    twins.both(accumulate)
    for (name, mine), theirs in zip(twins.ours.named_parameters(), twins.stock.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_patched_twice_and_unpatched_in_between() -> None:
    twins = small_twins()
    fuselora.patch_model(twins.ours)
    twins.check()
    fuselora.unpatch_model(twins.ours)
    with StayDouble():
        assert_same_results(run(twins.ours, batch()), run(twins.stock, batch()), rtol=0.0)
    fuselora.patch_model(twins.ours, strict=True)
    twins.check()
