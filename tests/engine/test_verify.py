"""verify(): passes correct models, fails planted errors, leaves the model as it was, explains what it can't do."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.models import base_model, batch, lora_model
from torch import nn

import fuselora
from fuselora.engine import verify as verify_module
from fuselora.engine.verify import verify


def parameter(model: nn.Module, part: str) -> tuple[str, nn.Parameter]:
    return next((name, p) for name, p in model.named_parameters() if part in name and p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_patched_model_passes_with_every_adapter_gradient(dtype):
    model = fuselora.patch_model(lora_model("llama", dtype))
    result = verify(model, batch())
    assert result.ok, str(result)
    assert {row.name for row in result.rows} == {name for name, p in model.named_parameters() if p.requires_grad}
    assert result.zero_gradients == 0 and 0 < result.pooled_stock < (1e-5 if dtype is torch.float32 else 0.1)
    assert str(result).splitlines()[-1].startswith("verify: ok: 28 gradients")


def test_stock_model_is_its_own_twin():
    result = verify(lora_model("llama"))
    assert result.ok and result.pooled_ours == result.pooled_stock > 0


def test_under_autocast_the_bounds_are_those_of_its_dtype():
    model = fuselora.patch_model(lora_model("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        result = verify(model)
    assert result.dtype is torch.bfloat16 and result.ok and result.pooled_stock > 1e-3, str(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_gradient_off_by_a_tenth_fails_and_is_named(dtype):
    model = fuselora.patch_model(lora_model("llama", dtype))
    name, weight = parameter(model, "k_proj.lora_B")
    weight.register_hook(lambda grad: grad * 1.1)
    result = verify(model)
    assert [row.name for row in result.rows if not row.ok] == [name]
    assert f"{name}" in str(result) and "verify: FAILED" in str(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_fails(value):
    model = lora_model("llama")
    name, weight = parameter(model, "lora_A")
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
    assert name in [row.name for row in verify(model).rows if not row.ok]


def test_missing_gradient_fails(monkeypatch):
    model = lora_model("llama")
    name, weight = parameter(model, "lora_A")
    run = verify_module._run

    def forgetful(of, inputs):
        result = run(of, inputs)
        if of is model:
            result.grads[name] = None
        return result

    monkeypatch.setattr(verify_module, "_run", forgetful)
    (row,) = [row for row in verify(model).rows if not row.ok]
    assert row.name == name and row.reason == "missing"


def test_wrong_loss_and_wrong_logits_fail():
    for what in ("loss", "logits"):
        model = lora_model("llama")
        model.base_model.model.register_forward_hook(spoil(model.base_model.model, what))
        result = verify(model)
        assert not getattr(result, what).ok, what
        assert not result.ok


def spoil(owner: nn.Module, what: str):
    """A hook that adds to one output, on the original only: copies of it see another module."""

    def hook(module, args, outputs):
        if module is owner:
            outputs[what] = outputs[what] + (0.01 if what == "loss" else torch.full((), 0.1))
        return outputs

    return hook


def test_zero_gradients_are_counted_and_said():
    model = lora_model("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    result = verify(model)
    assert result.ok and result.zero_gradients == 14
    assert "14 gradients are zero in truth" in str(result)


def test_the_model_is_left_as_it_was():
    model = fuselora.patch_model(lora_model("llama", lora={"lora_dropout": 0.3}))
    _, weight = parameter(model, "lora_A")
    weight.grad = torch.ones_like(weight)
    flags = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    random, classes = torch.get_rng_state(), [type(m) for m in model.modules()]
    result = verify(model)
    assert result.ok and "dropout is off" in str(result)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert classes == [type(m) for m in model.modules()] and torch.equal(random, torch.get_rng_state())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1


def test_gradient_checkpointing():
    model = lora_model("llama", torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert verify(fuselora.patch_model(model)).ok


def test_truth_keeps_fp64_where_stock_asks_for_fp32():
    x = torch.randn(3, dtype=torch.float64)
    with verify_module._KeepFloat64():
        kept = (
            x.float(),
            x.to(torch.float32),
            nn.functional.softmax(x, -1, dtype=torch.float32),
            x.to("cpu", torch.float32),
        )
        lower = torch.ones(3).to(torch.bfloat16)
    assert all(y.dtype is torch.float64 for y in kept) and lower.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: (None,), "expected a torch module, got NoneType"),
        (lambda m: (m.requires_grad_(False),), "expected trainable parameters, got none"),
        (lambda m: (m, {"input_ids": torch.ones(1, 4, dtype=torch.long)}), "expected labels"),
        (lambda m: (nn.Linear(3, 3),), "pass batch="),
        (lambda m: (m.to("meta"),), "expected all parameters on one device"),
    ],
    ids=["none", "frozen", "labels", "no-config", "meta"],
)
def test_bad_input_is_one_sentence(make, said):
    with pytest.raises(ValueError, match=said) as error:
        verify(*make(lora_model("llama")))
    assert "\n" not in str(error.value) and str(error.value).startswith("verify: ")


def test_quantised_weights_are_refused():
    model = lora_model("llama")
    model.extra = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="extra: expected floating-point weights or .* 4 or 8 bits, got torch.uint8"):
        verify(model)


def test_too_large_for_an_fp64_copy(monkeypatch):
    monkeypatch.setattr(verify_module, "_free_bytes", lambda device: 1 << 10)
    with pytest.raises(ValueError, match="GiB free on cpu for the fp64 copy.*fewer layers"):
        verify(base_model("llama"))
