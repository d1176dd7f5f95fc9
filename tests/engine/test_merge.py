"""Adapters merged into 4-bit bases: the formula, what is left of the model, and the drift that is reported."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.bnb import SIZES, import_bnb, qlora_model
from tests.support.models import add_lora, base_model, batch
from torch import nn

import fuselora
from fuselora import cli
from fuselora.engine import quickstart
from fuselora.engine.kbit import linears_4bit
from fuselora.engine.patch.quantized import read_4bit
from fuselora.engine.quantized_linear import Linear4bit
from fuselora.functional import dequantize_4bit

KINDS = pytest.mark.parametrize("kind", ["bitsandbytes", "ours"])


@pytest.fixture
def build(tmp_path):
    def build(kind, family="llama", **lora):
        if kind == "bitsandbytes":
            import_bnb()
            return qlora_model(family, lora=lora)
        base_model(family, torch.bfloat16, **SIZES).save_pretrained(tmp_path)
        return add_lora(fuselora.load_4bit(str(tmp_path), progress=False), **lora)

    return build


def exact_weights(model):
    """fp64: name of the linear -> dequantised weight + scaling B A."""
    weights = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            total = dequantize_4bit(read_4bit(layer.base_layer).weight, torch.float32).double()
            for adapter in layer.active_adapters:
                a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
                total += layer.scaling[adapter] * (b @ a)
            weights[name.removeprefix("base_model.model.")] = total
    return weights


@KINDS
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_dense_weights_are_the_sum_rounded_once(build, kind, patched, capsys):
    model = build(kind, "qwen2")
    want, before = exact_weights(model), model.train()(**batch()).logits.float()
    if patched:
        fuselora.patch_model(model)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    merged = fuselora.merge_4bit(model, inputs=inputs)
    assert len(want) == 14 and not list(linears_4bit(merged.model))
    for name, weight in want.items():
        layer = merged.model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16
        # One rounding to bf16, after fp32 sums whose error is far below its step.
        assert (layer.weight.double() - weight).abs().le(weight.abs() * 2**-8 * 1.01 + 1e-7).all(), name
    moved = merged.model(**batch()).logits.float() - before
    assert merged.drift_rms == pytest.approx(moved.square().mean().sqrt().item(), rel=0.3)
    assert 0 < merged.drift_rms <= merged.drift_max and merged.drift_rms < 0.02 * merged.logits_rms
    assert capsys.readouterr().out == f"merged: {merged}\n"


@KINDS
def test_merged_model_saves_and_loads_as_a_dense_one(build, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    base = fuselora.merge_4bit(build(kind)).model
    base.save_pretrained(tmp_path / "merged")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert back.dtype == torch.bfloat16 and getattr(back.config, "quantization_config", None) is None
    state = back.state_dict()
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


@KINDS
def test_requantised_keeps_the_layers_and_loses_more(build, kind):
    model = build(kind)
    want = exact_weights(model)
    dense = fuselora.merge_4bit(copy.deepcopy(model))
    quantised = fuselora.merge_4bit(model, requantize=True)
    assert quantised.drift_rms > 3 * dense.drift_rms
    layers = dict(linears_4bit(quantised.model))
    assert len(layers) == 14 and all((type(layer) is Linear4bit) == (kind == "ours") for layer in layers.values())
    for name, layer in layers.items():
        q = read_4bit(layer).weight
        assert q.absmax2 is not None and q.blocksize == 64
        error = (dequantize_4bit(q, torch.float32) - want[name]).abs()
        assert error.max() < 0.2 * want[name].abs().max()  # half the widest step of NF4 is 0.15


def test_dense_linears_and_several_adapters_merge_too(build):
    import peft

    model = build("bitsandbytes", target_modules=["q_proj", "down_proj", "lm_head"])
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    merged = fuselora.merge_4bit(model, inputs=inputs)
    assert merged.drift_rms < 0.02 * merged.logits_rms


def test_what_cannot_be_merged_changes_nothing(build):
    with pytest.raises(TypeError, match="expected a PeftModel with LoRA, got LlamaForCausalLM"):
        fuselora.merge_4bit(base_model("llama"))
    with pytest.raises(ValueError, match="expected an adapter on a 4-bit linear, got none; use merge_and_unload"):
        fuselora.merge_4bit(add_lora(base_model("llama")))
    model = build("bitsandbytes", use_dora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"q_proj: expected plain LoRA .* DoraLinearVariant"):
        fuselora.merge_4bit(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    """A dense base and an adapter that was trained on it in NF4, in folders."""
    base_model("llama", torch.bfloat16, **SIZES).save_pretrained(tmp_path / "base")
    model = add_lora(fuselora.load_4bit(str(tmp_path / "base"), progress=False))
    model.save_pretrained(tmp_path / "adapter")
    names = {"model_name_or_path": "base", "adapter_name_or_path": "adapter", "export_dir": "merged"}
    return model, [f"{key}={tmp_path / name}" for key, name in names.items()], tmp_path / "merged"


def test_command_line_writes_a_dense_model(saved, capsys):
    from transformers import AutoModelForCausalLM

    model, arguments, out = saved
    want = exact_weights(model)
    assert cli.main(["merge", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "merged: logits moved by at most" in shown and f"wrote {out}" in shown and "no tokenizer: neither" in shown
    back = AutoModelForCausalLM.from_pretrained(out)
    assert back.dtype == torch.bfloat16 and getattr(back.config, "quantization_config", None) is None
    for name, weight in want.items():
        step = weight.abs() * 2**-8 * 1.01 + 1e-7
        assert (back.get_submodule(name).weight.double() - weight).abs().le(step).all(), name
    assert not list(out.parent.glob(".merged*"))


def test_command_line_requantises_to_files_that_both_libraries_read(saved):
    from transformers import AutoModelForCausalLM

    import_bnb()
    _, arguments, out = saved
    assert cli.main(["merge", *arguments, "requantize=true", "double_quantization=false"]) == 0
    ours, theirs = fuselora.load_4bit(str(out), progress=False), AutoModelForCausalLM.from_pretrained(out)
    a, b = (dict(linears_4bit(model)) for model in (ours, theirs))
    assert len(a) == len(b) == 14
    for name, layer in a.items():
        q, other = read_4bit(layer).weight, read_4bit(b[name]).weight
        assert q.absmax2 is None and torch.equal(q.data, other.data) and torch.equal(q.absmax, other.absmax)


@KINDS
@pytest.mark.parametrize("requantize", [False, True], ids=["dense", "4-bit"])
def test_a_base_that_was_read_from_4bit_files_merges_and_saves(saved, kind, requantize):
    """Its loader left a conversion of weights behind that has no inverse, on which saving failed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import_bnb()
    _, _, out = saved
    files = out.parent / "4bit"
    fuselora.load_4bit(str(out.parent / "base"), progress=False).save_pretrained(files)
    load = fuselora.load_4bit if kind == "ours" else AutoModelForCausalLM.from_pretrained
    model = PeftModel.from_pretrained(load(str(files)), out.parent / "adapter")
    merged = fuselora.merge_4bit(model, requantize).model
    merged.save_pretrained(out)
    back = AutoModelForCausalLM.from_pretrained(out)
    assert len(list(linears_4bit(back))) == (14 if requantize else 0)
    ids = batch()["input_ids"]
    if not requantize:
        assert torch.equal(back(input_ids=ids).logits, merged.eval()(input_ids=ids).logits)


def test_command_line_knows_the_quickstart_base(saved, monkeypatch):
    _, (base, *rest), out = saved
    monkeypatch.setattr(quickstart, "base_model", lambda: base.partition("=")[2])
    assert cli.main(["merge", "model_name_or_path=quickstart", *rest]) == 0
    assert (out / "config.json").is_file()


def test_command_line_takes_the_tokenizer_of_the_adapter(saved, tokenizer):
    _, arguments, out = saved
    tokenizer.save_pretrained(out.parent / "adapter")
    assert cli.main(["merge", *arguments]) == 0
    assert (out / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a[1:], "model_name_or_path: expected a folder or hub id, got nothing; add model_name_or_path=..."),
        (lambda a: [*a, "lora=x"], "merge: expected key=value with a key of model_name_or_path, "),
        (lambda a: [*a, "requantize=7"], "requantize: expected true or false, got '7'"),
        (lambda a: [*a, "infer_dtype=int8"], "infer_dtype: expected one of bfloat16, float16, float32, got 'int8'"),
        (lambda a: [*a, "quantization_type=nf3"], "quant_type: expected one of ('nf4', 'fp4'), got 'nf3'"),
        (lambda a: [a[0].replace("base", "none"), *a[1:]], "model_name_or_path: expected a model, got "),
        (lambda a: [a[0], a[1].replace("/adapter", "/base"), a[2]], "adapter_config"),
        (lambda a: [*a[:2], a[2].replace("merged", "base")], "export_dir: expected an empty folder or none"),
    ],
)
def test_command_line_refuses_bad_input_in_one_line(saved, capsys, change, words):
    _, arguments, out = saved
    assert cli.main(["merge", *change(arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not out.exists()
