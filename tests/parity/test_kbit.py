"""Models prepared for k-bit training, by PEFT and by us: patched against stock and the dequantised truth."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from tests.support.bnb import SIZES, dense_twin, import_bnb, qlora_model, quantize_linears
from tests.support.models import add_lora, base_model, batch
from tests.support.parity import Run, assert_all_fused, assert_close_to_truth, run, run_truth
from torch import nn

import fuselora
from fuselora.engine.kbit import linears_4bit
from fuselora.kernels.numerics import rms

pytest.importorskip("bitsandbytes")
SEEDS = range(4)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    import_bnb()


def inputs() -> list[dict[str, torch.Tensor]]:
    return [batch(seed=seed, pad="right" if seed % 2 else None) for seed in SEEDS]


def base(compute: torch.dtype = torch.bfloat16, family: str = "llama", **options) -> nn.Module:
    return quantize_linears(base_model(family, torch.bfloat16, **SIZES), compute=compute, **options)


def truth_of(stock: nn.Module, many: list[dict[str, torch.Tensor]]) -> Run:
    """Without checkpointing: fp64 does not reach what is recomputed."""
    twin = dense_twin(stock, torch.bfloat16)
    twin.gradient_checkpointing_disable()
    return run_truth(twin, many)


def prepared_by_peft(**keys) -> nn.Module:
    return add_lora(peft.prepare_model_for_kbit_training(base(**keys)))


def prepared_by_us(use_gradient_checkpointing: bool = True, **keys) -> nn.Module:
    return add_lora(fuselora.prepare_kbit(base(**keys), use_gradient_checkpointing))


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_prepared_by_peft_is_accelerated_and_as_exact(family, monkeypatch):
    stock = prepared_by_peft(family=family)
    ours = fuselora.patch_model(copy.deepcopy(stock))
    many = inputs()
    truth, theirs = truth_of(stock, many), run(stock, many)
    bnb = import_bnb()
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", None)  # no base runs in bitsandbytes
    assert_close_to_truth(run(ours, many), truth, theirs, torch.float32)


def pooled(run_: Run, truth: Run) -> float:
    """The rms over all gradients of the relative error."""
    errors = [(rms(g.double() - truth.grads[n]) / rms(truth.grads[n])).item() for n, g in run_.grads.items()]
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


@pytest.mark.parametrize("adapters", ["fp32", "bf16", "fp32-autocast"])
def test_blocks_of_a_model_prepared_by_peft_err_like_stock(adapters):
    """Between the casts of an fp32 stream to bf16 and back: fp32 adapters stay fp32, others are bf16 in stock too.
    Blocks that round fp32 adapters' inputs to bf16 exceed stock's error by 1.35 to 1.57."""
    stock = add_lora(peft.prepare_model_for_kbit_training(base()), autocast_adapter_dtype=adapters != "bf16")
    if adapters == "bf16":
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    many = inputs()
    truth = truth_of(stock, many)
    with torch.autocast("cpu", torch.bfloat16, enabled=adapters == "fp32-autocast"):
        mine, theirs = run(ours, many), run(stock, many)
    assert_close_to_truth(mine, truth, theirs, torch.float32)
    assert_all_fused(ours)
    assert pooled(mine, truth) <= pooled(theirs, truth) * (1.05 if adapters == "fp32" else 1.25)


def test_the_report_names_the_casts_that_remain_and_the_remedy():
    ours = fuselora.patch_model(prepared_by_peft(), strict=True)
    run(ours, batch())
    rows = [row for row in fuselora.patch_report(ours).rows if row.reason]
    assert {row.kind for row in rows} == {"attention", "mlp", "lora_linear"}
    for row in rows:
        assert row.status == "fused" and not row.calls_declined
        assert "the input is torch.float32, bnb_4bit_compute_dtype torch.bfloat16" in row.reason
        assert "its base linears multiply in torch.bfloat16" in row.reason
        assert "fuselora.prepare_kbit keeps their dtype" in row.reason
    with torch.autocast("cpu", torch.bfloat16):
        run(ours, batch())
    assert any("it computes in torch.bfloat16" in row.reason for row in fuselora.patch_report(ours).rows)
    fuselora.unpatch_model(ours)
    assert not any("between two casts" in row.reason for row in fuselora.patch_report(ours).rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_of_another_dtype_than_the_compute_dtype_runs_stock_and_says_so(dtype):
    ours = fuselora.patch_model(prepared_by_peft(compute=torch.float16 if dtype == torch.bfloat16 else torch.bfloat16))
    with torch.autocast("cpu", dtype):
        ours(**batch())
    reasons = {row.reason for row in fuselora.patch_report(ours).unfused() if row.kind == "mlp"}
    assert any("under autocast a 4-bit layer takes torch.float32" in reason for reason in reasons)


def test_prepared_by_us_is_fused_throughout_and_as_exact():
    stock = prepared_by_us()
    ours = fuselora.patch_model(copy.deepcopy(stock), strict=True)
    many = inputs()
    assert_close_to_truth(run(ours, many), truth_of(stock, many), run(stock, many), torch.bfloat16)
    assert_all_fused(ours)


def test_preparing_changes_no_number():
    """Checkpointing, frozen weights and dtypes aside, the model is the one that was given."""
    plain, prepared = qlora_model("llama"), prepared_by_us()
    assert {n: p.dtype for n, p in plain.named_parameters()} == {n: p.dtype for n, p in prepared.named_parameters()}
    a, b = (run(fuselora.patch_model(model), batch()) for model in (plain, prepared))
    assert torch.equal(a.losses, b.losses)
    assert all(torch.equal(a.grads[name], b.grads[name]) for name in a.grads)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_freezing_checkpointing_and_input_gradients(kwargs):
    model = base()
    assert fuselora.prepare_kbit(model, True, kwargs) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    embedded = model.get_input_embeddings()(batch()["input_ids"])
    assert embedded.requires_grad or kwargs == {"use_reentrant": False}
    plain = fuselora.prepare_kbit(base(), use_gradient_checkpointing=False)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in plain.modules())


def test_fp32_compute_is_warned_of_and_mended():
    with pytest.warns(UserWarning, match=r"14 4-bit linears .* compute_dtype=torch.bfloat16"):
        fuselora.prepare_kbit(base(compute=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mended = fuselora.prepare_kbit(base(compute=torch.float32), compute_dtype=torch.bfloat16)
    assert {layer.compute_dtype for _, layer in linears_4bit(mended)} == {torch.bfloat16}
    ours = fuselora.patch_model(add_lora(mended), strict=True)
    right = run(fuselora.patch_model(prepared_by_us()), batch())
    assert torch.equal(run(ours, batch()).losses, right.losses)


def test_left_at_fp32_the_report_names_the_remedy():
    with pytest.warns(UserWarning):
        model = fuselora.prepare_kbit(base(compute=torch.float32))
    ours = fuselora.patch_model(add_lora(model))
    run(ours, batch())
    reasons = " ".join(row.reason for row in fuselora.patch_report(ours).unfused())
    assert "fuselora.prepare_kbit(model, compute_dtype=torch.bfloat16) avoids it" in reasons


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"prepare_kbit: model: expected a torch\.nn\.Module, got dict"):
        fuselora.prepare_kbit({})
    with pytest.raises(ValueError, match="got a PeftModel; call it before get_peft_model"):
        fuselora.prepare_kbit(qlora_model("llama"))
    with pytest.raises(ValueError, match=r"compute_dtype: expected .* got torch\.int8"):
        fuselora.prepare_kbit(base(), compute_dtype=torch.int8)
