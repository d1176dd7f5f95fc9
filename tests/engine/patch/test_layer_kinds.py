"""Layers and options that the fused path does not compute, or computes in part, on fp64 twins: exact, and reported."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tests.support.models import add_lora, base_model, batch, fill_adapters, randomize
from tests.support.parity import StayDouble
from tests.support.twins import SMALL, small_twins, twins_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save_trains_the_head(tied: bool) -> None:
    """The loss is computed from the trained copy of the head, and its weight gets a gradient."""
    stock = base_model("llama", torch.float64, tie_word_embeddings=tied, **SMALL)
    twins = twins_of(add_lora(stock, modules_to_save=["lm_head"], target_modules=["q_proj"]))
    grads = twins.check().grads
    (name,) = [n for n in grads if "lm_head" in n]
    assert grads[name].any()
    with twins.stock.disable_adapter(), twins.ours.disable_adapter():
        twins.check()
    step = torch.optim.SGD
    twins.both(lambda m: sgd_step(m, step))
    twins.check()


def sgd_step(model: nn.Module, optimizer: type[torch.optim.Optimizer]) -> None:
    with StayDouble():
        model(**batch()).loss.backward()
    optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def test_modules_to_save_trains_a_norm_and_the_embedding() -> None:
    stock = base_model("llama", torch.float64, **SMALL)
    twins = twins_of(add_lora(stock, modules_to_save=["input_layernorm", "post_attention_layernorm", "embed_tokens"]))
    grads = twins.check().grads
    assert sum("modules_to_save" in n and g.any().item() for n, g in grads.items()) == 3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_trained_norms_are_fused_into_residual_adds_and_rotation(family: str) -> None:
    """Through PEFT's wrapper, whichever copy it runs; nothing in the report is stock, every norm gets a gradient."""
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "q_norm", "k_norm"]
    model = add_lora(base_model(family, torch.float64, **SMALL), modules_to_save=norms, target_modules=["q_proj"])
    twins = twins_of(model)
    grads = twins.check().grads
    trained = [n for n in grads if "modules_to_save" in n]
    assert len(trained) == {"llama": 2, "qwen3": 4, "gemma2": 3}[family] and all(grads[n].any() for n in trained)
    assert not twins.reasons()
    twins.both(lambda m: sgd_step(m, torch.optim.SGD))
    twins.check()
    with twins.stock.disable_adapter(), twins.ours.disable_adapter():
        twins.check()
    assert not twins.reasons()


def test_a_hook_on_the_wrapper_of_a_norm_is_called() -> None:
    model = add_lora(base_model("llama", torch.float64, **SMALL), modules_to_save=["post_attention_layernorm"])
    twins = twins_of(model)
    double = lambda module, args, output: output * 2  # noqa: E731
    twins.both(lambda m: m.base_model.model.model.layers[0].post_attention_layernorm.register_forward_hook(double))
    twins.check()
    assert any("ModulesToSaveWrapper is stock" in reason for reason in twins.reasons())


def test_lora_on_the_head_trains() -> None:
    stock = base_model("llama", torch.float64, **SMALL)
    twins = twins_of(add_lora(stock, target_modules=["q_proj", "lm_head"]))
    grads = twins.check().grads
    assert sum("lm_head" in n and g.any().item() for n, g in grads.items()) == 2


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_bias(bias: str) -> None:
    lora = {"bias": bias, "target_modules": ["q_proj", "up_proj"]}
    twins = small_twins(lora=lora, attention_bias=True, mlp_bias=True)
    grads = twins.check().grads
    biases = [n for n, g in grads.items() if n.endswith("bias") and g.any()]
    assert len(biases) == (7 if bias == "all" else 2)  # q, k, v, o, gate, up, down
    assert not twins.reasons()


def test_fully_trained_model_without_adapters() -> None:
    twins = twins_of(base_model("llama", torch.float64, **SMALL), strict=True)
    grads = twins.check().grads
    assert all(g is not None and g.any() for g in grads.values()) and len(grads) == 12


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trainable_tokens(tied: bool) -> None:
    stock = base_model("llama", torch.float64, tie_word_embeddings=tied, **SMALL)
    twins = twins_of(add_lora(stock, trainable_token_indices=[5, 17, 101], target_modules=["q_proj", "down_proj"]))
    grads = twins.check().grads
    assert any("trainable_tokens" in n for n in grads)


def test_lora_on_the_embedding() -> None:
    stock = base_model("llama", torch.float64, **SMALL)
    twins = twins_of(add_lora(stock, target_modules=["embed_tokens", "q_proj"]))
    grads = twins.check().grads
    assert sum("lora_embedding" in n and g.any().item() for n, g in grads.items()) == 2


def test_conv1d_of_gpt2() -> None:
    config = GPT2Config(n_embd=24, n_head=3, n_layer=2, n_positions=32, vocab_size=131, n_inner=40)
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(config).double()
    randomize(stock)
    stock.eval()  # GPT-2 has dropout of its own
    twins = twins_of(add_lora(stock, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True).eval())
    twins.check(batch())
    assert {row.status for row in twins.rows(kind="norm")} == {"fused"}


class Custom(nn.Module):
    """A module that transformers has never seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 7, bias=False)
        self.conv = nn.Conv1d(7, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.norm(self.first(x))))
        return self.conv(y.transpose(1, 2))


@pytest.mark.parametrize("inject", [False, True], ids=["get_peft_model", "inject_adapter_in_model"])
def test_custom_module(inject: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second", "conv"], lora_bias=False)
    stock = inject_adapter_in_model(config, Custom()) if inject else get_peft_model(Custom(), config)
    fill_adapters(stock)
    twins = twins_of(stock.double())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    grads = twins.check({"x": x}).grads
    assert sum("lora_" in n and g.any().item() for n, g in grads.items()) == 6
    assert [row.module.rpartition(".")[2] for row in twins.rows(status="fused")] == ["first", "norm", "second"]
    assert all("conv" in row.module for row in twins.rows(status="stock"))


def test_mixins_add_no_name_that_a_stock_module_could_have():
    """Some test helpers set ``epsilon`` on every module that has it; a method of that name was lost that way."""
    from fuselora.engine.patch.families import FAMILIES
    from fuselora.engine.patch.loss import FusedCausalLM, FusedHead

    mixins = {rule.mixin for family in FAMILIES for rule in family.rules} | {FusedCausalLM, FusedHead}
    names = {name for mixin in mixins for cls in mixin.__mro__[:-1] for name in vars(cls)}
    ours = {name for name in names if not name.startswith(("fuse_", "_fuselora", "__"))}
    assert ours == {"forward", "loss_function", "_set_gradient_checkpointing"}, (
        "more than stock's methods that we extend"
    )
