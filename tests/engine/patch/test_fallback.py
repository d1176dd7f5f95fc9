"""When a module declines: hooks, instance forwards and wrappers keep working, and the report says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from tests.support.models import batch, lora_model
from tests.support.parity import StayDouble, assert_same_results, run
from tests.support.twins import SMALL, Twins, small_twins
from torch import nn

import fuselora

LAYER = "base_model.model.model.layers.0"


HOOKED = {
    "q_proj": (f"{LAYER}.self_attn.q_proj", "attention", "Linear has hooks"),
    "lora_A": (f"{LAYER}.mlp.up_proj.lora_A.default", "mlp", "adapter 'default': Linear has hooks"),
    "lora_B-of-o": (f"{LAYER}.self_attn.o_proj.lora_B.default", "lora_linear", "adapter 'default': Linear has hooks"),
    "base-layer": (f"{LAYER}.self_attn.v_proj.base_layer", "attention", "Linear has hooks"),
    "activation": (f"{LAYER}.mlp.act_fn", "mlp", "activation"),
    "norm": (f"{LAYER}.post_attention_layernorm", "layer", "LlamaRMSNorm has hooks"),
    "head": ("base_model.model.lm_head", "loss", "Linear has hooks"),
}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_children_fire_and_their_parent_declines(name: str, kind: str) -> None:
    path, row_kind, reason = HOOKED[name]
    twins, fired = small_twins(), []

    def watch(model: nn.Module) -> None:
        model.enable_input_require_grads()  # so that a frozen layer has a backward at all

        def hook(module: nn.Module, *args: Any) -> Any:
            fired.append(model is twins.ours)
            return args[-1] * 1.5 if kind == "forward" else None

        child = model.get_submodule(path)
        register = {
            "forward": child.register_forward_hook,
            "pre": child.register_forward_pre_hook,
            "backward": child.register_full_backward_hook,
        }
        register[kind](hook)

    twins.both(watch)
    twins.check()
    assert fired.count(True) == fired.count(False) == 1
    declined = [row for row in twins.rows() if row.calls_declined and row.kind == row_kind]
    assert declined and all(reason in row.reason for row in declined), fuselora.patch_report(twins.ours)


CALLED = ["self_attn", "mlp", "input_layernorm", "self_attn.o_proj", "self_attn.rotary_emb", ""]


@pytest.mark.parametrize("path", CALLED)
def test_hooks_on_modules_that_are_called_anyway_cost_nothing(path: str) -> None:
    """A hook on a fused module itself, or on one that the fused parent calls, is called as in stock."""
    where = {"": LAYER, "self_attn.rotary_emb": "base_model.model.model.rotary_emb"}.get(path, f"{LAYER}.{path}")
    twins, calls = small_twins(), []
    twins.both(lambda m: m.get_submodule(where).register_forward_hook(lambda *args: calls.append(m is twins.ours)))
    twins.check()
    assert calls.count(True) == calls.count(False) == 1
    assert not twins.reasons()


def test_global_hooks_see_every_module_of_stock() -> None:
    """Profilers and FLOP counters register a hook for all modules."""
    twins, seen = small_twins(), {True: [], False: []}
    names = {id(m): n for model in (twins.ours, twins.stock) for n, m in model.named_modules()}
    mine = {id(m) for m in twins.ours.modules()}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen[id(module) in mine].append(names.get(id(module)))
    )
    try:
        twins.check()
    finally:
        handle.remove()
    assert sorted(map(str, seen[True])) == sorted(map(str, seen[False]))


def test_instance_forward_is_not_bypassed() -> None:
    """Another patcher's forward on an instance, before or after ours, runs."""

    def double(module: nn.Module) -> None:
        stock_forward = module.forward
        module.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs) * 2

    for path in (
        f"{LAYER}.mlp.up_proj",
        f"{LAYER}.mlp",
        f"{LAYER}.post_attention_layernorm",
        "base_model.model.lm_head",
    ):
        before = lora_model("llama", torch.float64, **SMALL)
        double(before.get_submodule(path))
        ours = lora_model("llama", torch.float64, **SMALL)
        double(ours.get_submodule(path))
        twins = Twins(before, fuselora.patch_model(ours))
        twins.check()
        assert any("a forward of its own" in reason for reason in twins.reasons()) or path.endswith("lm_head"), path
        after = small_twins()
        after.both(lambda m, path=path: double(m.get_submodule(path)))
        after.check()


class Scale(ModelHook):
    """An accelerate hook that does something visible."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 0.5


@pytest.mark.parametrize("path", [f"{LAYER}.mlp", f"{LAYER}.mlp.gate_proj", f"{LAYER}.self_attn.q_proj"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks(path: str, when: str) -> None:
    stock = lora_model("llama", torch.float64, **SMALL)
    twins = Twins(stock, copy.deepcopy(stock))
    if when == "after":
        fuselora.patch_model(twins.ours, strict=True)
    twins.both(lambda m: add_hook_to_module(m.get_submodule(path), Scale()))
    fuselora.patch_model(twins.ours)
    hooked = twins.check()
    if when == "before":
        assert any("accelerate hook" in reason for reason in twins.reasons())
        with pytest.raises(ValueError, match="accelerate hook"):
            fuselora.patch_model(twins.ours, strict=True)
    twins.both(lambda m: remove_hook_from_module(m.get_submodule(path)))
    fuselora.patch_model(twins.ours)
    assert not torch.allclose(twins.check().logits, hooked.logits)


def test_offloaded_weights_stay_offloaded() -> None:
    """accelerate's offload hook moves weights in and out around each call of the hooked module."""
    twins = small_twins(lora={"target_modules": ["q_proj"]})
    weights = {k: v.clone() for k, v in twins.stock.get_submodule(f"{LAYER}.mlp.up_proj").state_dict().items()}

    def offload(model: nn.Module) -> None:
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(model.get_submodule(f"{LAYER}.mlp.up_proj"), hook)

    twins.both(offload)
    assert twins.ours.get_submodule(f"{LAYER}.mlp.up_proj").weight.is_meta
    with torch.no_grad(), StayDouble():
        assert_same_results(run(twins.ours, batch()), run(twins.stock, batch()))


def test_fallbacks_are_logged_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Unique(nn.Dropout):
        pass

    model = fuselora.patch_model(lora_model("llama", lora={"target_modules": ["o_proj"]}), strict=True)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.o_proj.lora_dropout["default"] = Unique(0.0)
    for _ in range(3):
        model(**batch())
    assert len([r for r in caplog.records if "Unique" in r.getMessage()]) == 1
    (row, _) = [r for r in fuselora.patch_report(model).rows if r.calls_declined]
    assert row.calls_declined == 3 and row.status == "stock"


def test_report_says_where_logits_are_computed():
    """An adapter on the head, or a look at the logits before the loss: both are exact, and neither is silent."""
    adapted = fuselora.patch_model(lora_model("llama", lora={"target_modules": ["q_proj", "lm_head"]}))
    row = next(row for row in fuselora.patch_report(adapted).rows if row.cls == "LlamaForCausalLM")
    assert row.status != "fused" and "adapter" in row.reason

    model = fuselora.patch_model(lora_model("llama"))
    inner, inputs = model.get_base_model(), batch()
    logits = model(**inputs).logits
    logits + 0
    inner.loss_function(logits=logits, labels=inputs["labels"], vocab_size=inner.config.vocab_size)
    row = next(row for row in fuselora.patch_report(model).rows if row.cls == "LlamaForCausalLM")
    assert row.status != "fused" and "before the loss" in row.reason and row.calls_declined == 1
