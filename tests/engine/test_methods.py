"""What each method trains, that fused training computes the same, and that its result loads in stock libraries."""

import json
import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fuselora
from fuselora import cli
from fuselora.engine.adapters import merge_in_fp32
from fuselora.engine.checkpoint_weights import load_weights, save_weights
from fuselora.engine.errors import UserError
from fuselora.engine.methods import trainable_summary
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir, save_result

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def build(make_config, tiny_base):
    """(model, configuration) of a method; nothing is trained yet."""

    def build(base=tiny_base, **keys):
        config = make_config(model_name_or_path=str(base), **keys)
        return build_model(str(base), config), config

    return build


@pytest.fixture
def arguments(tiny_base, dataset_dir, tmp_path):
    keys = {
        "model_name_or_path": tiny_base,
        "dataset": "rows",
        "dataset_dir": dataset_dir,
        "output_dir": tmp_path / "out",
        "use_cpu": True,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_new_tokens": 4,
        "eval_on_start": False,
    }
    return lambda **more: [f"{key}={value}" for key, value in (keys | more).items()]


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@torch.no_grad()
def move(model, scale=0.05):
    """Stand in for training: every trained weight somewhere else."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * scale)


@pytest.mark.parametrize(
    "keys, layers, outside",
    [
        ({"freeze_trainable_layers": 1}, {"1"}, set()),
        ({"freeze_trainable_layers": -1}, {"0"}, set()),
        ({"freeze_trainable_layers": 5}, {"0", "1"}, set()),
        ({"freeze_trainable_layers": 1, "freeze_extra_modules": "norm,embed_tokens"}, {"1"}, {"norm", "embed_tokens"}),
    ],
)
def test_freeze_selects_layers(build, keys, layers, outside):
    names = trained(build(finetuning_type="freeze", **keys)[0])
    assert {name.split(".")[2] for name in names if ".layers." in name} == layers
    assert {name.split(".")[-2] for name in names if ".layers." not in name} == outside
    assert len([name for name in names if ".layers." in name]) == 9 * len(layers)


def test_freeze_selects_parts_of_layers(build):
    keys = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
    names = trained(build(**keys, freeze_trainable_modules="mlp,input_layernorm")[0])
    assert names == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")} | {
        "model.layers.1.input_layernorm.weight"
    }
    with pytest.raises(UserError, match="freeze_trainable_modules: expected names among input_layernorm, .* got 'mpl'"):
        build(**keys, freeze_trainable_modules="mpl")
    with pytest.raises(UserError, match="freeze_extra_modules: .* got 'head'"):
        build(**keys, freeze_extra_modules="head")


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_checkpointing_asks_no_gradient_of_frozen_embeddings(build, method):
    """Frozen first layers would be kept and run backward. Re-entrant checkpointing needs it."""
    keys = {"finetuning_type": method, "disable_gradient_checkpointing": False}
    assert not build(**keys)[0].get_input_embeddings()(IDS).requires_grad
    if method == "lora":
        assert build(use_reentrant_gc=True, **keys)[0].get_input_embeddings()(IDS).requires_grad


def test_summary_counts_what_is_trained(build):
    model, _ = build(finetuning_type="freeze", freeze_trainable_layers=1, freeze_trainable_modules="mlp")
    total, count = sum(p.numel() for p in model.parameters()), 3 * 24 * 40
    text = trainable_summary(model)
    assert text.startswith(f"trained weights: {count:,} of {total:,} ({count / total:.2%})\n")
    assert "layers.*.mlp.up_proj" in text and "self_attn" not in text
    lora = trainable_summary(build(additional_target="embed_tokens")[0])
    assert "layers.*.self_attn.q_proj lora" in lora and "embed_tokens modules_to_save" in lora


@pytest.mark.parametrize(
    "keys", [{"finetuning_type": "full"}, {"finetuning_type": "freeze"}], ids=lambda k: [*k.values()][0]
)
def test_fused_training_agrees_with_stock_and_loads_in_transformers(arguments, tmp_path, capsys, tiny_base, keys):
    losses = []
    for fuse in (True, False):
        assert cli.main(["train", *arguments(fuse=fuse, output_dir=tmp_path / f"{fuse}", **keys)]) == 0
        lines = (tmp_path / f"{fuse}" / "trainer_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    text = capsys.readouterr().out
    assert "0 stock" in text and float(text.split("stock (fp32): ")[1].split()[0]) <= 1e-5
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_base).named_parameters())
    changed = {name for name, p in result.named_parameters() if not torch.equal(p, base[name])}
    kept = {"model.embed_tokens.weight", "model.norm.weight"} if keys["finetuning_type"] == "freeze" else set()
    assert changed == base.keys() - kept


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_bf16_keeps_trained_weights_in_fp32_and_computes_in_bf16(build, method, tmp_path):
    model, config = build(finetuning_type=method, freeze_trainable_layers=1, bf16=True)
    dtypes = {(p.dtype, p.requires_grad) for p in model.parameters()}
    frozen = {(torch.bfloat16, False)} if method == "freeze" else set()
    assert dtypes == {(torch.float32, True)} | frozen
    fuselora.patch_model(model, strict=True)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    result = fuselora.verify(model)
    assert result.ok, str(result)
    move(model)
    save_result(model, open_output_dir(config), config)
    back = AutoModelForCausalLM.from_pretrained(config.output_dir)
    assert back.dtype == torch.bfloat16
    error = (logits(back) - logits(model)).abs().max()
    assert error < 0.05 * logits(model).abs().max()


@pytest.mark.parametrize(
    "keys",
    [
        {"finetuning_type": "full"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"pissa_init": True},
        {"additional_target": "embed_tokens,lm_head"},
        {"use_dora": True, "use_rslora": True},
    ],
    ids=["full", "freeze", "pissa", "embeddings", "dora"],
)
def test_checkpoint_holds_what_was_trained_bit_for_bit(build, keys, tmp_path):
    model, _ = build(**keys)
    move(model)
    save_weights(model, tmp_path, None)
    other, _ = build(**keys)
    load_weights(tmp_path, other)
    state = dict(other.named_parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == {"trained.safetensors" if "finetuning_type" in keys else "adapter_model.safetensors"}


def test_checkpoint_of_other_layers_is_refused(build, tmp_path):
    save_weights(build(finetuning_type="freeze", freeze_trainable_layers=1)[0], tmp_path, None)
    with pytest.raises(UserError, match="expected the weights that this run trains, got 'model.layers.0.*one side"):
        load_weights(tmp_path, build(finetuning_type="freeze", freeze_trainable_layers=-1)[0])


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_interrupted_run_goes_on_bit_for_bit(arguments, tmp_path, method):
    keys = {"finetuning_type": method, "save_steps": 2, "check_adapter": False}
    assert cli.main(["train", *arguments(output_dir=tmp_path / "whole", **keys)]) == 0
    again = arguments(output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", **keys)
    assert cli.main(["train", *again]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize("keys", [{"pissa_iter": -1}, {"pissa_iter": 4, "use_rslora": True}])
def test_pissa_starts_at_the_base_and_saves_a_plain_adapter(build, tiny_base, keys):
    base = logits(AutoModelForCausalLM.from_pretrained(tiny_base))
    model, config = build(pissa_init=True, **keys)
    torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.lora_B["default"].weight.abs().max() > 0
    fuselora.patch_model(model)
    move(model)
    moved = logits(model)
    assert (moved - base).abs().max() > 0.1
    save_result(model, open_output_dir(config), config)
    torch.testing.assert_close(logits(model), moved, rtol=0, atol=0)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), config.output_dir)
    assert stock.peft_config["default"].r == 2 * config.lora_rank
    torch.testing.assert_close(logits(stock), moved, rtol=1e-4, atol=1e-5)


def test_loftq_moves_a_4bit_base_towards_the_dense_one(tmp_path_factory, build):
    pytest.importorskip("bitsandbytes")
    from tests.support.bnb import SIZES
    from tests.support.models import base_model

    folder = tmp_path_factory.mktemp("wide")
    base_model("llama", **SIZES).save_pretrained(folder)
    dense = logits(AutoModelForCausalLM.from_pretrained(folder))

    def error(**keys):
        model, config = build(base=folder, quantization_bit=4, lora_rank=16, lora_alpha=32, **keys)
        return (logits(fuselora.patch_model(model)) - dense).square().mean().sqrt()

    assert error(loftq_init=True) < 0.8 * error()


def test_embeddings_and_head_stay_one_weight(build, tiny_base):
    model, config = build(additional_target="embed_tokens,lm_head")
    fuselora.patch_model(model)
    move(model)
    inner = model.base_model.model
    torch.testing.assert_close(
        inner.get_input_embeddings().weight, inner.get_output_embeddings().weight, rtol=0, atol=0
    )
    save_result(model, open_output_dir(config), config)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), config.output_dir)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


@pytest.fixture
def adapters(build, tmp_path):
    """Folders of two adapters of the tiny base, the second trained behind the first, and its logits."""
    folders = []
    for name in ("first", "second"):
        keys = {"adapter_name_or_path": folders, "create_new_adapter": True} if folders else {}
        model, config = build(output_dir=str(tmp_path / name), **keys)
        move(model, 0.1)
        save_result(model, open_output_dir(config), config)
        folders.append(str(tmp_path / name))
    return folders, logits(model)


def test_several_adapters_are_merged_and_the_last_goes_on(build, adapters):
    folders, want = adapters
    model, _ = build(adapter_name_or_path=folders)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert trained(model) and all("lora_" in name for name in trained(model))
    fresh, _ = build(adapter_name_or_path=folders, create_new_adapter=True)
    torch.testing.assert_close(logits(fresh), want, rtol=1e-4, atol=1e-5)
    assert all(p.abs().max() == 0 for name, p in fresh.named_parameters() if "lora_B" in name)


def test_adapter_of_another_base_is_refused(build, adapters, tiny_base, tmp_path):
    folders, _ = adapters
    with pytest.raises(UserError, match="expected an adapter of this base .* got '.*second', trained on"):
        build(adapter_name_or_path=folders[1])
    build(adapter_name_or_path=folders[1], check_base=False)
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="name the base it was trained on"):
        build(base=tmp_path / "other", adapter_name_or_path=folders[0])


def test_an_adapter_that_is_a_pickle_is_not_opened(build, adapters, tmp_path):
    """Its code would leave a file behind."""

    class Canary:
        def __reduce__(self):
            return open, (str(tmp_path / "canary"), "w")

    folder = tmp_path / "pickled"
    shutil.copytree(adapters[0][0], folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Canary()}))
    with pytest.raises(UserError, match="adapter_name_or_path: expected adapter_model.safetensors .* got a pickle"):
        build(adapter_name_or_path=str(folder))
    assert not (tmp_path / "canary").exists()


def test_fingerprint_is_that_of_the_weights_not_of_the_files(tiny_base, tmp_path):
    from fuselora.engine.fingerprint import base_fingerprint

    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert base_fingerprint(str(tmp_path)) == base_fingerprint(str(tiny_base)) is not None
    (tmp_path / "pickled").mkdir()
    assert base_fingerprint(str(tmp_path / "pickled")) is None


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_merging_rounds_once(build, keys):
    """In bf16: within one rounding of the fp32 sum, where PEFT's own merge rounds the update before it adds."""
    model, _ = build(bf16=True, **keys)
    move(model)
    exact, _ = build(**keys)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    merged, truth = merge_in_fp32(model).state_dict(), exact.merge_and_unload().state_dict()
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert (value.float() - truth[name]).abs().le(truth[name].abs() * 2**-8 * 1.01 + 1e-7).all(), name


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"finetuning_type": "full", "use_dora": True}, "use_dora: expected nothing with finetuning_type full"),
        ({"finetuning_type": "freeze", "quantization_bit": 4}, "finetuning_type: expected lora on a quantised base"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "freeze_trainable_layers: expected a number"),
        ({"pissa_init": True, "quantization_bit": 8}, "pissa_init: expected false with quantization_bit"),
        ({"loftq_init": True}, "loftq_init: expected quantization_bit: 4"),
        ({"create_new_adapter": True}, "create_new_adapter: expected adapters to merge first"),
        ({"adapter_name_or_path": "a,b", "quantization_bit": 4}, "adapter_name_or_path: expected one adapter"),
        ({"adapter_name_or_path": "a", "pissa_init": True}, "pissa_init: expected a fresh adapter"),
    ],
)
def test_impossible_combinations(make_config, keys, words):
    with pytest.raises(UserError, match=words):
        make_config(**keys)
