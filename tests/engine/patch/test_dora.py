"""Layers with PEFT's DoRA on fp64 twins: fused and exact through changes of state, declined where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.layer import LoraLayer
from tests.support.models import add_lora, base_model
from tests.support.twins import SMALL, Twins, add_adapter, small_twins, twins_of

import fuselora


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_dora_model_is_fused(family: str) -> None:
    """The blocks call their projections one by one and keep RoPE and the GLU."""
    twins = twins_of(add_lora(base_model(family, torch.float64, **SMALL), use_dora=True), strict=True)
    result = twins.check()
    assert any("lora_magnitude_vector" in name and g.any() for name, g in result.grads.items())
    assert not twins.reasons() and not any(row.calls_declined for row in twins.rows())


def test_dora_on_some_projections() -> None:
    """Beside plain linears, and beside plain LoRA of another adapter."""
    twins = twins_of(
        add_lora(base_model("qwen2", torch.float64, **SMALL), use_dora=True, target_modules=["q_proj", "up_proj"]),
        strict=True,
    )
    twins.check()
    twins.both(add_adapter("other", target_modules=["k_proj", "gate_proj"]))
    fuselora.patch_model(twins.ours)
    twins.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    twins.check()
    assert not any(row.calls_declined for row in twins.rows())


def test_a_block_around_stock_dora_runs_stock() -> None:
    twins = twins_of(add_lora(base_model("llama", torch.float64, **SMALL), use_dora=True), disable=["lora_linear"])
    twins.check()
    assert {row.kind for row in twins.rows() if row.calls_declined} == {"attention", "mlp"}


def test_dora_beside_plain_lora() -> None:
    """Each alone is fused; together, stock multiplies what the first adds with the second's magnitudes."""
    twins = small_twins()
    twins.both(add_adapter("dora", use_dora=True))
    twins.both(lambda m: m.set_adapter("dora"))
    twins.check()
    assert {row.status for row in twins.rows(kind="lora_linear")} == {"fused"}
    for pair in (["default", "dora"], ["dora", "default"]):
        twins.both(lambda m, pair=pair: m.base_model.set_adapter(pair))
        twins.check()
        assert {row.reason for row in twins.rows(kind="lora_linear")} == {"2 adapters are active, DoRA among them"}
    twins.both(lambda m: m.set_adapter("default"))
    twins.check()


def dora_twins(**lora: Any) -> Twins:
    """DoRA on a projection outside the blocks: everything is fused."""
    options = {"use_dora": True, "target_modules": ["o_proj"], **lora}
    return twins_of(add_lora(base_model("llama", torch.float64, **SMALL), **options))


def test_dora_follows_its_state() -> None:
    """Scaling, also as a tensor, a trained base, the magnitude's own state, merging, disabling, eval."""
    twins = dora_twins()
    (layer,) = [name for name, m in twins.stock.named_modules() if isinstance(m, LoraLayer)]

    def change(act: Callable[[Any], Any]) -> None:
        twins.both(lambda m: act(m.get_submodule(layer)))
        twins.check()

    change(lambda m: m.set_scale("default", 3.0))
    change(lambda m: m.scaling.update(default=torch.tensor(0.7)))
    change(lambda m: m.lora_magnitude_vector["default"].weight.requires_grad_(False))
    change(lambda m: m.base_layer.weight.requires_grad_(True))
    change(lambda m: m.lora_magnitude_vector["default"].weight.data.mul_(-1.3))
    change(lambda m: m.lora_magnitude_vector["default"].weight.data[3:5].zero_())
    change(lambda m: m.lora_magnitude_vector["default"].weight.data.add_(0.5))
    assert not twins.reasons() and not any(row.calls_declined for row in twins.rows())
    twins.both(lambda m: m.eval())
    twins.check()
    with twins.stock.disable_adapter(), twins.ours.disable_adapter():
        twins.check()
    change(lambda m: m.merge())
    change(lambda m: m.unmerge())
    assert not any(row.calls_declined for row in twins.rows())


@pytest.mark.parametrize("training", [False, True])
def test_dora_dropout_asks_the_layer(training: bool) -> None:
    """A dropout module that trains inside a layer that does not drops nothing, as in stock."""
    twins = dora_twins(lora_dropout=0.5)
    for model in (twins.stock, twins.ours):
        (layer,) = [m for m in model.modules() if isinstance(m, LoraLayer)]
        layer.training, layer.lora_dropout.training = not training, training
        layer.lora_dropout["default"].training = training
    twins.check()
    assert not any(row.calls_declined for row in twins.rows())


@pytest.mark.parametrize("case", ["hook", "caching", "derived", "magnitude", "base hook"])
def test_dora_declines(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = dora_twins()
    layers = [m for model in (twins.stock, twins.ours) for m in model.modules() if isinstance(m, LoraLayer)]
    reason = {
        "hook": "DoraLinearLayer has hooks",
        "caching": "DoRA caching is enabled",
        "derived": "uses the variant MyVariant",
        "magnitude": "keeps its magnitude in a MyLayer",
        "base hook": "Linear has hooks",
    }[case]
    for layer in layers:
        length = layer.lora_magnitude_vector["default"]
        if case == "hook":
            length.register_forward_hook(lambda module, args, output: 2 * output)
        elif case == "caching":
            monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
            length.eval()
        elif case == "derived":
            kind = type(layer.lora_variant["default"])
            layer.lora_variant["default"] = type("MyVariant", (kind,), {})()
        elif case == "magnitude":
            length.__class__ = type("MyLayer", (type(length),), {})
        else:
            layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    twins.check()
    (row,) = twins.rows(kind="lora_linear")
    assert row.status == "stock" and row.calls_declined == 1 and reason in row.reason
