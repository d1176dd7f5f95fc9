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
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.support.models import add_lora, base_model, batch, fill_adapters, randomize
from tests.support.parity import StayDouble, assert_same_results, run
from tests.support.twins import SMALL, Twins, small_twins, twins_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fuselora


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def add_adapter(name: str, seed: int = 5, **lora: Any):
    """The change ``add_adapter`` with values in lora_B."""
    config = {"r": 3, "lora_alpha": 2, "target_modules": "all-linear", **lora}

    def change(model: PeftModel) -> None:
        torch.manual_seed(seed)
        model.add_adapter(name, LoraConfig(**config))
        fill_adapters(model, seed, name)

    return change


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
    assert twins.reasons() == {"2 adapters are active"}
    assert all(row.status == "fused" for row in twins.rows(kind="lora_linear"))
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


def test_dora_runs_stock() -> None:
    twins = twins_of(add_lora(base_model("llama", torch.float64, **SMALL), use_dora=True))
    result = twins.check()
    assert any("lora_magnitude_vector" in name and g.any() for name, g in result.grads.items())
    assert twins.reasons() == {"adapter 'default' uses the variant DoraLinearVariant"}
    declined = {row.kind: row.calls_declined for row in twins.rows() if row.reason}
    assert declined == {"attention": 1, "mlp": 1, "lora_linear": 1}
    with pytest.raises(ValueError, match="strict=True: .*DoraLinearVariant"):
        fuselora.patch_model(copy.deepcopy(twins.stock), strict=True)


def test_dora_beside_plain_lora() -> None:
    twins = small_twins()
    twins.both(add_adapter("dora", use_dora=True))
    twins.both(lambda m: m.set_adapter("dora"))
    twins.check()
    twins.both(lambda m: m.base_model.set_adapter(["default", "dora"]))
    twins.check()
    twins.both(lambda m: m.set_adapter("default"))
    twins.check()


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
    twins.both(lambda m: m.double())
    twins.check()


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
