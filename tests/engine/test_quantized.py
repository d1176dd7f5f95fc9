"""Training on quantised bases: keys, resume, the saved adapter; and what bitsandbytes' absence says."""

import importlib.util
import json

import pytest
import torch
from tests.support.bnb import import_bnb

from fuselora import cli
from fuselora.engine import checkpoint
from fuselora.engine.data import load_data
from fuselora.engine.errors import UserError
from fuselora.engine.kbit import linears_4bit
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model, patch_report
from fuselora.engine.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def quiet():
    import_bnb()


@pytest.fixture
def start(make_config, tiny_base, tokenizer, tmp_path):
    def start(out="out", **keys):
        keys = {"quantization_bit": 4, "fuse": True, "max_steps": 4, "disable_gradient_checkpointing": False} | keys
        config = make_config(output_dir=str(tmp_path / out), **keys)
        train = load_data(config, tokenizer).train
        model = build_model(str(tiny_base), config)
        if config.fuse:
            patch_model(model)
        open_output_dir(config)
        return Trainer(model, train, train[:4], config, pad_id=tokenizer.pad_token_id)

    return start


@pytest.mark.parametrize(
    ("keys", "dtype", "kind", "double"),
    [
        ({"bf16": True}, torch.bfloat16, "nf4", True),
        ({"pure_bf16": True, "quantization_type": "fp4"}, torch.bfloat16, "fp4", True),
        ({"double_quantization": False}, torch.float32, "nf4", False),
    ],
    ids=["bf16", "pure-fp4", "fp32"],
)
def test_keys_reach_every_linear_but_the_head(start, keys, dtype, kind, double):
    model = start(**keys).model
    layers = dict(linears_4bit(model))
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (layer.compute_dtype, state.quant_type, state.nested) == (dtype, kind, double)
    norms = [p for name, p in model.named_parameters() if "norm" in name or "embed" in name]
    assert {p.dtype for p in norms} == {dtype} and not any(p.requires_grad for p in norms)


@pytest.mark.parametrize("keys", [{"bf16": True}, {"quantization_bit": 8, "bf16": True}], ids=["4bit", "8bit"])
def test_training_learns_and_runs_fused(start, keys):
    trainer = start(**keys, max_steps=8, logging_steps=1)
    trainer.fit()
    losses = [record["loss"] for record in trainer.log.records if "loss" in record]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2])
    adapters = {row.status for row in patch_report(trainer.model).rows if row.kind == "lora_linear"}
    assert adapters == {"fused"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_resume_is_exact(start, reentrant):
    keys = {"bf16": True, "use_reentrant_gc": reentrant, "lora_dropout": 0.1, "save_steps": 2}
    whole = start("whole", **keys)
    whole.fit()
    start("halves", **keys | {"lr_scheduler_type": "linear"}).fit()
    checkpoints = whole.output_dir.parent / "halves"
    (checkpoints / "checkpoint-4" / checkpoint.MANIFEST).unlink()  # as if killed after step 2
    resumed = start("halves", **keys, resume_from_checkpoint=True)
    resumed.resume()
    assert resumed.step == 2
    resumed.fit()
    pairs = zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_checkpoint_of_another_quantisation_is_refused(start):
    start(save_steps=2, max_steps=2).fit()
    other = start(quantization_type="fp4", resume_from_checkpoint=True)
    with pytest.raises(UserError, match="base and adapter weights"):
        other.resume()


def test_command_line_reloads_the_adapter_in_stock_peft(tiny_base, dataset_dir, tmp_path, capsys):
    out = tmp_path / "out"
    keys = {"model_name_or_path": tiny_base, "dataset": "rows", "dataset_dir": dataset_dir, "output_dir": out}
    keys |= {"quantization_bit": 4, "bf16": True, "max_steps": 2, "use_cpu": True, "max_new_tokens": 4}
    assert cli.main(["train", *(f"{key}={value}" for key, value in keys.items())]) == 0
    shown = capsys.readouterr().out
    difference = float(shown.split("stock (fp32): ")[1].split()[0])
    assert difference < 1e-4
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["lora_alpha"] == 16


def test_evaluation_first_leaves_stock_training_its_gradients(start, monkeypatch):
    """bitsandbytes repacks weights for evaluation on some CPUs, and a step on those gives no gradients."""
    monkeypatch.setattr("fuselora.engine.model.misread_on_cpu", lambda model: None)
    trainer = start(fuse=False, bf16=True)
    trainer.evaluate()
    assert not any(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False) for _, m in linears_4bit(trainer.model)
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name}
    trainer.training_step()
    trainer.training_step()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_unfused_training_on_rows_that_are_no_whole_blocks_is_refused(start):
    with pytest.raises(UserError, match=r"fuse: expected true .* got false, where bitsandbytes computes model\.layers"):
        start(fuse=False)


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_without_the_libraries(start, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    remedy = r"run: pip install 'fuselora\[quant\]'"
    with pytest.raises(UserError, match=rf"quantization_bit: .* 4 without {missing}; {remedy}"):
        start()


def test_copies_of_4bit_weights_stay_within_their_key(tiny_base, dataset_dir, tmp_path, capsys):
    keys = {
        "model_name_or_path": tiny_base,
        "dataset": "rows",
        "dataset_dir": dataset_dir,
        "output_dir": tmp_path / "out",
    }
    keys |= {"quantization_bit": 4, "bf16": True, "max_steps": 1, "use_cpu": True, "check_adapter": "false"}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    assert cli.main(["train", *arguments, "dequant_cache_gb=1"]) == 0
    assert "dequantised once: its copy will be kept (dequant_cache_gb)" in capsys.readouterr().out
    assert cli.main(["train", *arguments, "dequant_cache_gb=-1"]) == 2
    assert "dequant_cache_gb: expected 0 or more, got -1" in capsys.readouterr().err
