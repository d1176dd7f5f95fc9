"""Each family, patched against stock and against the fp64 truth; then each option of LoRA, model and batch in turn.

``tests/support/parity.py`` says which errors are compared and why. Every case also asserts that nothing ran stock.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.models import FAMILIES, HIDDEN, batch, lora_model, packed_batch
from tests.support.parity import (
    Curve,
    StayDouble,
    assert_all_fused,
    assert_close_to_truth,
    assert_curves_close,
    assert_gradients_close,
    assert_losses_close,
    double_copy,
    run,
    run_truth,
    to_double,
    train_curve,
)
from transformers.trainer_pt_utils import LabelSmoother

import fuselora
from fuselora.kernels.numerics import K_REDUCTION, rms
from fuselora.testing import assert_kernel_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SEEDS = range(4)
CURVE_SEEDS = range(3)
LLAMA_ROPE = {"rope_theta": 10000.0, "factor": 4.0}


def batches() -> list[dict[str, torch.Tensor]]:
    """With and without padding; were all padded at the end, the last rows would have no gradient to get wrong."""
    return [batch(seed=seed, pad=pad) for seed, pad in zip(SEEDS, ("right", None, "left", None), strict=True)]


def patched_twin(stock: torch.nn.Module) -> torch.nn.Module:
    return fuselora.patch_model(copy.deepcopy(stock), strict=True)


def check(stock: torch.nn.Module, inputs: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """The patched twin on every batch, by the numerics rule, with every module fused."""
    ours = patched_twin(stock)
    assert_close_to_truth(run(ours, inputs), run_truth(stock, inputs), run(stock, inputs), dtype)
    assert_all_fused(ours)


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients(family: str, dtype: torch.dtype) -> None:
    check(lora_model(family, dtype), batches(), dtype)


def curves(family: str, dtype: torch.dtype, error: float = 0.0) -> list[tuple[Curve, Curve, Curve]]:
    """(ours, truth, stock) of a run for each seed; each element of our gradients is off by ``error`` of itself."""
    runs = []
    for seed in CURVE_SEEDS:
        stock = lora_model(family, dtype)
        ours, exact = patched_twin(stock), double_copy(stock)
        for parameter in (p for p in ours.parameters() if p.requires_grad and error):
            parameter.register_hook(lambda grad: grad * (1 + error * torch.randn_like(grad)))
        inputs = [batch(seed=seed, pad="right")] * 10
        with StayDouble():
            truth = train_curve(exact, [to_double(b) for b in inputs])
        assert truth.losses[-1] < 0.8 * truth.losses[0], "the run learns nothing, so it shows nothing"
        runs.append((train_curve(ours, inputs), truth, train_curve(stock, inputs)))
        assert_all_fused(ours)
    return runs


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_curve(family: str, dtype: torch.dtype) -> None:
    """Ten optimizer steps, three runs."""
    assert_curves_close(curves(family, dtype))


def test_loss_curve_sees_a_gradient_off_by_one_percent() -> None:
    with pytest.raises(AssertionError, match="^loss|^logits"):
        assert_curves_close(curves("llama", torch.float32, error=0.01))


class Case(NamedTuple):
    """One option: the family it is tried on, LoRA options, model options."""

    family: str = "llama"
    lora: dict[str, Any] = {}
    config: dict[str, Any] = {}


CASES = {
    "targets-q-v": Case(lora={"target_modules": ["q_proj", "v_proj"]}),
    "targets-gate": Case(lora={"target_modules": ["gate_proj"]}),
    "targets-down": Case(lora={"target_modules": ["down_proj"]}),
    "targets-o": Case(lora={"target_modules": ["o_proj"]}),
    "targets-one-layer": Case(lora={"layers_to_transform": [1], "target_modules": ["k_proj", "up_proj"]}),
    "targets-packed-qkv": Case("phi3", {"target_modules": ["qkv_proj"]}),
    "targets-packed-gate-up": Case("phi3", {"target_modules": ["gate_up_proj"]}),
    "base-bias": Case(config={"attention_bias": True, "mlp_bias": True}),
    "base-bias-without-adapter": Case("qwen2", {"target_modules": ["q_proj", "down_proj"]}),
    "lora-bias": Case(lora={"lora_bias": True}, config={"attention_bias": True}),
    "trained-base-bias": Case("qwen2", {"bias": "all"}),
    "trained-lora-only-bias": Case("qwen2", {"bias": "lora_only"}),
    "mixed-ranks": Case(
        lora={
            "rank_pattern": {"q_proj": 8, "down_proj": 3, "layers.0.mlp.up_proj": 1},
            "alpha_pattern": {"v_proj": 1, "gate_proj": 20},
        }
    ),
    "rank-above-width": Case(lora={"r": 64}),
    "rslora": Case(lora={"use_rslora": True}),
    "pissa": Case(lora={"init_lora_weights": "pissa"}),
    "tied-head": Case(config={"tie_word_embeddings": True}),
    "one-kv-head": Case(config={"num_key_value_heads": 1}),
    "no-grouping": Case(config={"num_key_value_heads": 6}),
    "head-dim": Case(config={"head_dim": 20}),
    "window": Case("mistral", config={"sliding_window": 3}),
    "no-window": Case("mistral", config={"sliding_window": None}),
    "window-per-layer": Case("qwen2", config={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "partial-rotary": Case("phi3", config={"partial_rotary_factor": 0.5}),
    "rope-linear": Case(config={"rope_parameters": {**LLAMA_ROPE, "rope_type": "linear"}}),
    "rope-dynamic": Case(
        config={"rope_parameters": {**LLAMA_ROPE, "rope_type": "dynamic"}, "max_position_embeddings": 8}
    ),
    "rope-yarn": Case(
        config={"rope_parameters": {**LLAMA_ROPE, "rope_type": "yarn", "original_max_position_embeddings": 16}}
    ),
    "rope-llama3": Case(
        config={
            "rope_parameters": {
                **LLAMA_ROPE,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        }
    ),
    "rope-longrope": Case(
        "phi3",
        config={
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "eager-window-softcap": Case("gemma2", config={"attn_implementation": "eager", "sliding_window": 3}),
    "softcap-without-window": Case("gemma2", config={"layer_types": ["full_attention"] * 2}),
    "softcap-one-kv-head": Case("gemma2", config={"num_key_value_heads": 1}),
    "no-softcap": Case("gemma2", config={"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gelu-erf": Case("gemma", config={"hidden_activation": "gelu"}),
}


@pytest.mark.parametrize("name", CASES)
def test_option(name: str) -> None:
    """fp32, where a wrong formula is 10^5 times the bound."""
    case = CASES[name]
    check(lora_model(case.family, lora=case.lora, **case.config), batches(), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention(family: str) -> None:
    """Every other test runs SDPA, transformers' default; gemma2 is eager, so natively soft-capped when patched."""
    stock = lora_model(family, attn_implementation="eager")
    assert stock.config._attn_implementation == "eager"
    check(stock, batches(), torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3"])
def test_bf16_adapters_on_a_bf16_base(family: str) -> None:
    stock = lora_model(family, torch.bfloat16, lora={"autocast_adapter_dtype": False})
    assert stock.get_parameter(next(n for n, _ in stock.named_parameters() if "lora_A" in n)).dtype == torch.bfloat16
    check(stock, batches(), torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite"])
def test_bf16_autocast_on_an_fp32_model(family: str) -> None:
    stock = lora_model(family)
    ours, inputs = patched_twin(stock), batches()
    truth = run_truth(stock, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = run(stock, inputs), run(ours, inputs)
    assert_close_to_truth(mine, truth, theirs, torch.bfloat16)
    assert_all_fused(ours)


def test_fp16() -> None:
    check(lora_model("llama", torch.float16), batches(), torch.float16)


def _shifted(inputs: dict[str, Any]) -> dict[str, Any]:
    """The labels already shifted, as sequence parallelism passes them; ``labels`` only says that a loss is wanted."""
    labels = inputs["labels"]
    return {**inputs, "shift_labels": torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)}


def _embedded(inputs: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn((*inputs["input_ids"].shape, HIDDEN), generator=generator)
    return {"inputs_embeds": embeds, "labels": inputs["labels"]}


INPUTS = {
    "no-padding": lambda seed: batch(seed=seed),
    "one-token": lambda seed: {k: v for k, v in batch(1, 1, seed=seed).items() if k != "labels"},
    "one-sequence": lambda seed: batch(1, 17, seed=seed),
    "left-padded": lambda seed: batch(seed=seed, pad="left"),
    "packed": lambda seed: packed_batch(seed=seed),
    "num-items-int": lambda seed: {**batch(seed=seed), "num_items_in_batch": 29},
    "num-items-tensor": lambda seed: {**batch(seed=seed), "num_items_in_batch": torch.tensor(29)},
    "shift-labels": lambda seed: _shifted(batch(seed=seed)),
    "no-labels": lambda seed: {"input_ids": batch(seed=seed)["input_ids"]},
    "logits-to-keep": lambda seed: {"input_ids": batch(seed=seed)["input_ids"], "logits_to_keep": 3},
    "logits-to-keep-indices": lambda seed: {
        "input_ids": batch(seed=seed)["input_ids"],
        "logits_to_keep": torch.tensor([0, 4, 11]),
    },
    "embeds": lambda seed: _embedded(batch(seed=seed)),
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(family: str, name: str) -> None:
    check(lora_model(family), [INPUTS[name](seed) for seed in SEEDS], torch.float32)


def test_input_embeddings_get_the_gradient_of_stock() -> None:
    """Adapter gradients alone would not notice a first layer that loses the gradient of its input."""
    stock = lora_model("llama")
    ours, exact = patched_twin(stock), double_copy(stock)

    def gradient(model: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        inputs = _embedded(batch())
        embeds = inputs["inputs_embeds"].to(dtype).requires_grad_()
        model(inputs_embeds=embeds, labels=inputs["labels"]).loss.backward()
        return embeds.grad

    with StayDouble():
        truth = gradient(exact, torch.float64)
    assert_kernel_close(gradient(ours, torch.float32), truth, gradient(stock, torch.float32), k=K_REDUCTION)


@pytest.mark.parametrize("count", [None, 17])
def test_no_trained_token_gives_a_differentiable_zero(count: int | None) -> None:
    """Stock's mean over no token is NaN; with a count it is zero like ours."""
    ours = patched_twin(lora_model("llama"))
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss = ours(**inputs, num_items_in_batch=count).loss
    assert loss.item() == 0.0
    loss.backward()
    grads = [p.grad for p in ours.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


@DTYPES
def test_label_smoothing_of_the_trainer(dtype: torch.dtype) -> None:
    """HF Trainer calls the model without labels and smooths on its logits."""
    stock = lora_model("gemma2", dtype)
    ours, exact = patched_twin(stock), double_copy(stock)
    inputs = batch(pad="right")
    labels = inputs.pop("labels")

    def smoothed(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = LabelSmoother(epsilon=0.1)(model(**inputs), labels, shift_labels=True)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    with StayDouble():
        truth = smoothed(exact)
    theirs, mine = smoothed(stock), smoothed(ours)
    logits_error = rms(stock(**inputs).logits.detach().double() - exact(**inputs).logits.detach().double()).item()
    assert_losses_close(mine[0], truth[0], theirs[0], logits_error)
    assert_gradients_close(mine[1], truth[1], theirs[1], dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [None, "left"])
def test_greedy_generation_with_cache(family: str, pad: str | None) -> None:
    stock = lora_model(family).eval()
    ours = patched_twin(stock)
    inputs = batch(length=7, pad=pad)
    del inputs["labels"]
    tokens = [m.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True) for m in (stock, ours)]
    assert tokens[0].shape == (2, 15) and torch.equal(*tokens)
    assert_all_fused(ours)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cache_continues_a_prompt(family: str) -> None:
    """A prompt in two pieces through the key-value cache gives the logits of the whole."""
    ours = patched_twin(lora_model(family).eval())
    ids = batch()["input_ids"]
    with torch.no_grad():
        whole = ours(input_ids=ids).logits
        first = ours(input_ids=ids[:, :9], use_cache=True)
        second = ours(input_ids=ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-5)
