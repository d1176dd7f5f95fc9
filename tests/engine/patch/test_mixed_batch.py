"""Batches in which every sample has its own adapter (PEFT's ``adapter_names``)."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.models import add_lora, base_model, batch, fill_adapters
from tests.support.parity import StayDouble

import fuselora
from fuselora.functional import LoRA, lora_delta

NAMES = ["default", "__base__", "other", "default", "wide"]


@pytest.fixture(scope="module")
def stock():
    from peft import LoraConfig

    model = add_lora(base_model("llama", torch.float64))
    for name, rank in (("other", 3), ("wide", 9)):
        model.add_adapter(name, LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "down_proj"]))
        fill_adapters(model, seed=rank, adapter=name)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.eval()


def logits(model, names):
    ids = batch(len(names))["input_ids"]
    with torch.no_grad(), StayDouble():
        return model(input_ids=ids, adapter_names=names).logits


@pytest.mark.parametrize("names", [NAMES, ["other"] * 3, ["__base__"] * 2], ids=["mixed", "one", "none"])
def test_every_sample_gets_its_own_adapter(stock, names):
    ours = fuselora.patch_model(copy.deepcopy(stock))
    torch.testing.assert_close(logits(ours, names), logits(stock, names), rtol=1e-9, atol=1e-9)
    linears = [row for row in fuselora.patch_report(ours).rows if row.kind == "lora_linear"]
    assert linears and all(row.status == "fused" and row.calls_declined == 0 for row in linears)


def test_what_peft_refuses_is_refused(stock):
    ours = fuselora.patch_model(copy.deepcopy(stock))
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        ours(input_ids=batch(3)["input_ids"], adapter_names=["default"])


def test_gradients_reach_only_the_rows_own_adapter():
    def lora(seed):
        generator = torch.Generator().manual_seed(seed)
        return LoRA(*(torch.randn(s, generator=generator).requires_grad_() for s in ((4, 24), (16, 4))), 0.5)

    first, second = lora(1), lora(2)
    x, y = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 16)
    lora_delta(y, x, (first, second), torch.tensor([1, -1, 1])).sum().backward()
    assert first.a.grad.abs().max() == first.b.grad.abs().max() == 0 and second.a.grad.abs().min() > 0
    assert x.grad[1].abs().max() == 0
    rows = [0, 2]
    expected = torch.autograd.grad(lora_delta(y[rows], x[rows], second).sum(), (second.a, second.b))
    for a, b in zip((second.a.grad, second.b.grad), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("routes", "said"),
    [(torch.zeros(2, 1), r"routes.dim\(\): expected 1"), (torch.zeros(4), r"routes.shape\[0\]: expected 3")],
)
def test_routes_that_do_not_fit_are_refused(routes, said):
    lora = LoRA(torch.zeros(4, 24), torch.zeros(16, 4))
    with pytest.raises(ValueError, match=f"lora_delta: {said}"):
        lora_delta(torch.zeros(3, 5, 16), torch.zeros(3, 5, 24), lora, routes)
