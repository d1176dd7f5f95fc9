"""LoRA dropout: exact with the same mask in stock, and drawn, reproduced and switched off as dropout must be.

Stock's nn.Dropout draws its mask from another stream, so the stock twin gets ``ReplayDropout`` in its place: it draws a
seed where the fused block draws one and multiplies with that seed's mask. Blocks draw in the order in which stock calls
its projections, so under one ``torch.manual_seed`` both see the same masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tests.support.models import batch, fill_adapters, lora_model
from tests.support.parity import Run, assert_all_fused, assert_close_to_truth, run, run_truth
from torch import Tensor, nn

import fuselora
from fuselora.functional import dropout_mask
from fuselora.kernels import lora_linear
from fuselora.kernels.dropout import draw_seed

P = 0.3


class ReplayDropout(nn.Module):
    """Dropout with the masks of fuselora: one seed per call."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * dropout_mask(draw_seed(), x.shape, self.p, x.device) / (1.0 - self.p)


def with_replay(model: nn.Module) -> nn.Module:
    """A copy of a stock model whose LoRA dropouts replay fuselora's masks."""
    twin = copy.deepcopy(model)
    for layer in [m for m in twin.modules() if isinstance(m, LoraLayer)]:
        for name, dropout in layer.lora_dropout.items():
            layer.lora_dropout[name] = ReplayDropout(getattr(dropout, "p", 0.0)).train(dropout.training)
    return twin


def dropout_model(family: str = "llama", dtype: torch.dtype = torch.float32, **lora: object) -> nn.Module:
    return lora_model(family, dtype, lora={"lora_dropout": P, **lora})


def check_with_injected_masks(stock: nn.Module, dtype: torch.dtype) -> nn.Module:
    ours, twin = fuselora.patch_model(copy.deepcopy(stock)), with_replay(stock)
    inputs = [batch(seed=seed, pad="right") for seed in range(4)]
    assert_close_to_truth(run(ours, inputs), run_truth(twin, inputs), run(twin, inputs), dtype)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_exact_with_the_same_masks(family: str, dtype: torch.dtype) -> None:
    assert_all_fused(check_with_injected_masks(dropout_model(family, dtype), dtype))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]])
def test_exact_on_some_projections(targets: list[str]) -> None:
    assert_all_fused(check_with_injected_masks(dropout_model(target_modules=targets), torch.float32))


def test_exact_with_a_rate_per_projection() -> None:
    """Some projections of a block drop and share nothing, the others share one GEMM."""
    stock = dropout_model(lora_bias=True)
    rates = {"q_proj": 0.0, "k_proj": 0.5, "up_proj": 0.0, "down_proj": 0.1}
    for name, layer in stock.named_modules():
        if isinstance(layer, LoraLayer) and (rate := rates.get(name.rpartition(".")[2])) is not None:
            layer.lora_dropout["default"] = nn.Dropout(rate) if rate else nn.Identity()
    assert_all_fused(check_with_injected_masks(stock, torch.float32))


def test_exact_with_two_active_adapters() -> None:
    """Each adapter of each projection draws its own mask."""
    stock = dropout_model()
    stock.add_adapter("other", LoraConfig(r=3, lora_alpha=2, target_modules="all-linear", lora_dropout=0.5))
    fill_adapters(stock, seed=5)
    stock.base_model.set_adapter(["default", "other"])
    assert_all_fused(check_with_injected_masks(stock, torch.float32))


def identity_layer(p: float, width: int = 96) -> nn.Module:
    """A PEFT model that returns its dropped input: W = 0, A = B = 1, scaling = 1."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    model = get_peft_model(model, LoraConfig(r=width, lora_alpha=width, target_modules=["0"], lora_dropout=p))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.eye(width) if "lora_" in name else torch.zeros(width, width))
    return fuselora.patch_model(model, strict=True).train()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """Elements drop independently at rate p: overall, per row and per column; what is kept is scaled by 1 / (1 - p)."""
    model, x = identity_layer(p), torch.ones(2048, 96)
    torch.manual_seed(3)
    y = model(x).detach()
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    for count, rates in ((y.numel(), kept.double().mean()), (2048, kept.double().mean(0)), (96, kept.double().mean(1))):
        deviation = (rates - (1 - p)).abs().max().item() / (p * (1 - p) / count) ** 0.5
        assert deviation < 5.5, f"{deviation:.1f} standard deviations off the rate over {count} elements"
    pairs = (kept[:, 1:] & kept[:, :-1]).double().mean().item()
    assert abs(pairs - (1 - p) ** 2) < 5.5 * (1 / y.numel()) ** 0.5, "neighbours are not independent"


def test_gradient_has_the_mask_of_the_forward() -> None:
    model, x = identity_layer(0.4), torch.ones(7, 96, requires_grad=True)
    torch.manual_seed(3)
    y = model(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@contextmanager
def recorded_seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every seed that a fused function draws."""
    seeds: list[int] = []

    def record() -> Tensor:
        seed = draw_seed()
        seeds.append(int(seed))
        return seed

    with monkeypatch.context() as patch:
        patch.setattr(lora_linear, "draw_seed", record)
        yield seeds


def test_each_projection_and_step_has_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuselora.patch_model(dropout_model(), strict=True)
    layers = sum(isinstance(m, LoraLayer) for m in model.modules())
    torch.manual_seed(3)
    with recorded_seeds(monkeypatch) as seeds:
        for _ in range(2):
            model(**batch()).loss.backward()
    assert len(seeds) == len(set(seeds)) == 2 * layers


def assert_identical(first: Run, second: Run) -> None:
    assert torch.equal(first.losses, second.losses) and torch.equal(first.logits, second.logits)
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name


def test_manual_seed_reproduces_a_step() -> None:
    model = fuselora.patch_model(dropout_model(), strict=True)
    first = run(model, batch(), seed=5)
    assert_identical(first, run(model, batch(), seed=5))
    assert not torch.equal(first.losses, run(model, batch(), seed=6).losses)


def test_eval_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = dropout_model().eval()
    without = lora_model("llama").eval()
    without.load_state_dict(stock.state_dict())
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    with recorded_seeds(monkeypatch) as seeds:
        assert_identical(run(ours, batch()), run(fuselora.patch_model(without), batch()))
    assert not seeds
    assert not torch.equal(run(ours, batch()).losses, run(ours.train(), batch()).losses)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.enable_input_require_grads()
    enable: Callable[..., None] = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # renamed in transformers 5.2x
    enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recompute_draws_the_masks_of_the_forward(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are those of the run without checkpointing, though every layer's seeds are drawn twice."""
    stock = dropout_model()
    plain = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    recomputing = checkpointed(fuselora.patch_model(stock, strict=True), reentrant)
    layers = sum(isinstance(m, LoraLayer) for m in stock.modules())
    with recorded_seeds(monkeypatch) as seeds:
        ours = run(recomputing, batch())
    assert len(seeds) == 2 * layers and len(set(seeds)) == layers
    assert_identical(ours, run(plain, batch()))
