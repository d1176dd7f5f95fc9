"""What a patched layer costs in Python, so that it can't creep back: launch-bound steps are as long as their calls.

Counted are the calls of Python functions, all but transformers', in forward and backward of one more layer: no load of
the machine changes them. Beside it: what is read past ``nn.Module.__getattr__`` is what that would give.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tests.support.models import batch, lora_model
from torch import nn
from torch.nn.utils import parametrize

import fuselora
from fuselora.engine.patch.state import child, first_parameter, linear_kind, parameter
from fuselora.kernels import native, native_gemm

THEIRS = str(Path(transformers.__file__).parent)  # its own code per layer differs from version to version
NATIVE = "native"
# Measured, and 3 % for what other versions of Python count otherwise.
MOST_CALLS = {"references": 2250, NATIVE: 2430}


def calls_of_a_step(layers: int, dtype: torch.dtype) -> int:
    model = fuselora.patch_model(lora_model("llama", dtype, num_hidden_layers=layers)).train()
    inputs = batch(2, 16)
    counts: Counter[str] = Counter()

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()

    def count(frame, event, _):
        if event == "call" and not frame.f_code.co_filename.startswith(THEIRS):
            counts[frame.f_code.co_name] += 1

    step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return counts.total()


@pytest.mark.parametrize("kind", MOST_CALLS)
def test_python_calls_of_a_layer_are_bounded(kind, monkeypatch):
    if kind != NATIVE:
        monkeypatch.setattr(native, "reason", lambda: "none for this test")
    elif native.reason() or native_gemm.dense_refusal(32, torch.ones(1)):
        pytest.skip("fp32 products are torch's on this machine")
    calls = (calls_of_a_step(3, torch.float32) - calls_of_a_step(1, torch.float32)) / 2
    assert 0 < calls <= MOST_CALLS[kind], calls


def as_plain_attribute(model: nn.Module) -> None:
    """As FSDP and weight_norm leave a module: the parameter is gone, a tensor of that name is there."""
    linear = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    weight = linear.weight.detach() + 1
    del linear.weight
    linear.weight = weight


def replaced(model: nn.Module) -> None:
    for linear in [m for m in model.modules() if type(m) is nn.Linear]:
        linear.weight = nn.Parameter(linear.weight + 1)


def parametrized(model: nn.Module) -> None:
    linear = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default")
    parametrize.register_parametrization(linear, "weight", nn.Tanh())


def moved(model: nn.Module) -> None:
    model.to(torch.float64)


CHANGES = {f.__name__: f for f in (as_plain_attribute, replaced, parametrized, moved)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_reading_past_getattr_gives_what_getattr_gives(change):
    model = fuselora.patch_model(lora_model("llama"))
    model(**batch())
    change(model)
    for module in model.modules():
        for name in dict(module.named_children()):
            assert child(module, name) is getattr(module, name)
        for name in ("weight", "bias"):
            if hasattr(module, name) and not parametrize.is_parametrized(module, name):
                assert parameter(module, name) is getattr(module, name)
            elif hasattr(module, name):
                assert torch.equal(parameter(module, name), getattr(module, name))
        assert first_parameter(module) is next(module.parameters(), None)
    assert child(model, "active_adapter") == model.active_adapter


def test_a_kind_belongs_to_the_very_class():
    class Derived(nn.Linear):
        """A linear that may compute anything."""

    model = fuselora.patch_model(lora_model("llama"))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    kinds = [linear_kind(cls) for cls in (type(layer), type(layer.base_layer), nn.Linear, Derived, nn.Module)]
    assert kinds == ["adapted", "dense", "dense", "", ""]
    fuselora.unpatch_model(model)
    assert linear_kind(type(layer)) == "adapted"
