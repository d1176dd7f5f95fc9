"""Dense copies of 4-bit weights: made once, within the budget, from the bytes that are there now."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from tests.support.bnb import SIZES, dense_twin, import_bnb, qlora_model
from tests.support.models import add_lora, base_model, batch
from tests.support.parity import assert_all_fused, assert_close_to_truth, run, run_truth
from torch.utils._python_dispatch import TorchDispatchMode

import fuselora
from fuselora.engine.kbit import linears_4bit
from fuselora.engine.patch.dequant_cache import _KEPT, kept_bytes
from fuselora.kernels import lora

ALL = float("inf")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    import_bnb()


class Dequantised(TorchDispatchMode):
    """Counts the calls of our dequantiser inside."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.fuselora.dequantize_4bit.default
        return func(*args, **(kwargs or {}))


def copies(model):
    entries = [_KEPT.get(layer) for _, layer in linears_4bit(model)]
    return [weakref.ref(entry.dense) for entry in entries if entry is not None and entry.dense is not None]


def dequantised(model, steps=1):
    with Dequantised() as mode:
        for _ in range(steps):
            run(model, batch())
    return mode.calls


def sizes(model):
    return [layer.in_features * layer.out_features * 2 for _, layer in linears_4bit(model)]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_one_dequantisation_serves_every_pass_and_is_as_exact(options, monkeypatch):
    stock = qlora_model("llama", lora=options)
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True, dequant_cache_gb=ALL)
    many = [batch(seed=seed) for seed in range(4)]
    truth = run_truth(dense_twin(stock, torch.bfloat16), many)
    assert_close_to_truth(run(ours, many), truth, run(stock, many), torch.bfloat16)
    assert_all_fused(ours)
    assert kept_bytes(ours) <= sum(sizes(ours))
    assert len(copies(ours)) == (
        14 if len(options) != 1 or "use_dora" in options else 12
    )  # o_proj without an adapter is bitsandbytes'
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert dequantised(ours, steps=2) == 0
    monkeypatch.setattr(lora, "as_it_is", lambda *args: False)  # products decode the weights where they lie
    assert dequantised(fuselora.patch_model(copy.deepcopy(stock))) >= 14


def test_first_layers_that_fit_are_chosen_and_the_report_says_so():
    model = qlora_model("llama")
    budget = sum(sizes(model)[:5]) + 1
    ours = fuselora.patch_model(model, dequant_cache_gb=budget / 1e9)
    before = {row.module: row.reason for row in fuselora.patch_report(ours).rows if row.kind == "lora_linear"}
    run(ours, batch())
    after = {row.module: row.reason for row in fuselora.patch_report(ours).rows if row.kind == "lora_linear"}
    kept = [name for name, reason in after.items() if "copy is kept (dequant_cache_gb, 0.0 MB)" in reason]
    assert 5 <= len(kept) and [*after][:5] == kept[:5] and 0 < kept_bytes(ours) <= budget
    assert {name for name, reason in before.items() if "copy will be kept" in reason} == set(kept)
    assert all("does not fit dequant_cache_gb" in after[name] for name in after if name not in kept)


def test_models_that_peft_prepared_and_linears_of_ours(tmp_path, monkeypatch):
    import peft

    monkeypatch.setattr(lora, "as_it_is", lambda *args: False)  # the products of dense copies, for their bits
    base_model("llama", torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    base = fuselora.load_4bit(str(tmp_path), progress=False)
    prepared = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    ours = fuselora.patch_model(add_lora(prepared), dequant_cache_gb=ALL)
    first = run(ours, batch())
    assert dequantised(ours) == 0 and kept_bytes(ours) == sum(sizes(ours))
    again = run(fuselora.patch_model(ours, dequant_cache_gb=0), batch())
    assert kept_bytes(ours) == 0
    assert all(torch.equal(first.grads[name], grad) for name, grad in again.grads.items())


def test_weights_that_changed_are_dequantised_anew(monkeypatch):
    monkeypatch.setattr(lora, "as_it_is", lambda *args: False)  # the products of dense copies, for their bits
    model = fuselora.patch_model(qlora_model("llama"), dequant_cache_gb=ALL)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    before = run(model, batch())
    for change in (
        lambda weight: setattr(weight, "data", weight.data.roll(1)),  # other bytes, maybe at the same address
        lambda weight: weight.copy_(weight.roll(1)),  # in place
        lambda weight: setattr(layer.base_layer, "weight", copy.deepcopy(weight)),  # another tensor of the same bytes
    ):
        with torch.no_grad():
            change(layer.base_layer.weight)
        assert dequantised(model) == 1 and dequantised(model) == 0
        fresh = run(fuselora.patch_model(copy.deepcopy(model)), batch())
        assert torch.equal(run(model, batch()).losses, fresh.losses)
        assert not torch.equal(fresh.losses, before.losses)
    with pytest.warns(UserWarning, match="rounding errors"):
        layer.merge()
        layer.unmerge()
    assert dequantised(model) == 1


def test_a_copy_made_in_inference_mode_serves_training():
    model = fuselora.patch_model(qlora_model("llama"), dequant_cache_gb=ALL)
    with torch.inference_mode():
        model(**batch())
    assert dequantised(model) == 0


def test_copies_go_with_unpatching_with_the_model_and_do_not_travel():
    model = fuselora.patch_model(qlora_model("llama"), dequant_cache_gb=ALL)
    run(model, batch())
    clone = copy.deepcopy(model)
    assert kept_bytes(clone) == 0 and kept_bytes(model) > 0
    fuselora.patch_model(model)
    assert kept_bytes(model) > 0
    dense = copies(model)
    assert len(dense) == 14
    fuselora.unpatch_model(model)
    gc.collect()
    assert kept_bytes(model) == 0 and not any(ref() is not None for ref in dense)
    assert not any("dequant_cache_gb" in row.reason for row in fuselora.patch_report(model).rows)


@pytest.mark.parametrize("budget", [-1, float("nan")])
def test_a_budget_that_is_no_size_is_refused(budget):
    with pytest.raises(ValueError, match="dequant_cache_gb: expected a size in GB of 0 or more, got"):
        fuselora.patch_model(base_model("llama"), dequant_cache_gb=budget)
