"""q/k norms join the rotation, unless something watches them or they differ: then they run by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.fused_calls import FusedCalls
from tests.support.models import batch, lora_model
from tests.support.twins import SMALL, Twins, small_twins, twins_of
from torch import nn

import fuselora

FAMILIES = ["qwen3", "gemma3_text"]
ATTENTION = "base_model.model.model.layers.0.self_attn"


def calls(model: nn.Module) -> Counter[str]:
    """One forward and backward of a one-layer model."""
    with FusedCalls() as mode:
        model(**batch()).loss.backward()
    return mode.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_rotation_are_one_call_each_way(family: str, dtype: torch.dtype) -> None:
    model = fuselora.patch_model(lora_model(family, dtype, **SMALL), strict=True)
    counts = calls(model)
    assert counts["qk_norm_rope"] == counts["qk_norm_rope_bwd"] == 1 and counts["rope"] == 0
    (row,) = [row for row in fuselora.patch_report(model).rows if row.kind == "attention"]
    assert row.status == "fused" and row.reason.startswith("attention runs")


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_norms_get_their_gradient(family: str) -> None:
    twins = small_twins(family)
    twins.both(lambda m: [m.get_parameter(f"{ATTENTION}.{n}_norm.weight").requires_grad_() for n in "qk"])
    twins.check()
    assert calls(twins.ours)["qk_norm_rope_bwd"] == 1
    gradients = [twins.ours.get_parameter(f"{ATTENTION}.{n}_norm.weight").grad for n in "qk"]
    assert all(g is not None and g.any() for g in gradients)


def hooked(twins: Twins, fired: list[bool]) -> None:
    def watch(model: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            fired.append(model is twins.ours)
            return output * 1.5

        model.get_submodule(f"{ATTENTION}.q_norm").register_forward_hook(hook)

    twins.both(watch)


def watched_backwards(twins: Twins, fired: list[bool]) -> None:
    def watch(model: nn.Module) -> None:
        def hook(*args: Any) -> None:
            fired.append(model is twins.ours)

        model.get_submodule(f"{ATTENTION}.k_norm").register_full_backward_hook(hook)

    twins.both(watch)


def own_forward(twins: Twins, fired: list[bool]) -> None:
    def wrap(model: nn.Module) -> None:
        norm = model.get_submodule(f"{ATTENTION}.k_norm")
        inner = norm.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            fired.append(model is twins.ours)
            return inner(x) * 0.5

        norm.forward = forward

    twins.both(wrap)


@pytest.mark.parametrize("change", [hooked, watched_backwards, own_forward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_watches_a_norm_sees_it(family: str, change: Callable[[Twins, list[bool]], None]) -> None:
    twins, fired = small_twins(family), list[bool]()
    change(twins, fired)
    twins.check()
    assert fired.count(True) == fired.count(False) == 1
    counts = calls(twins.ours)
    assert counts["qk_norm_rope"] == 0 and counts["rope"] == 2  # forward and adjoint


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_different_epsilons_run_by_themselves(family: str) -> None:
    twins, name = small_twins(family), "eps" if family == "gemma3_text" else "variance_epsilon"
    twins.both(lambda m: setattr(m.get_submodule(f"{ATTENTION}.k_norm"), name, 0.5))
    twins.check()
    assert calls(twins.ours)["rope"] == 2
    twins.both(lambda m: setattr(m.get_submodule(f"{ATTENTION}.q_norm"), name, 0.5))
    twins.check()
    assert calls(twins.ours)["rope"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_norms_stay_stock(family: str) -> None:
    twins = twins_of(lora_model(family, torch.float64, **SMALL), disable=("norm", "layer"))
    twins.check()
    counts = calls(twins.ours)
    assert counts["qk_norm_rope"] == counts["rms_norm"] == 0 and counts["rope"] == 2
