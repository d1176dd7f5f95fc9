"""Two processes compute what one does: same losses and weights to fp32 rounding, one checkpoint, any world size."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fuselora.engine.memory_shapes import LayerShape

CUTOFF = 256
LAYER = LayerShape(24, 40, 3, 1, 8, attention_ranks=4 * 4, mlp_ranks=3 * 4)  # of the tiny base
MIXED_GB = 2 * CUTOFF * sum(LAYER.kept(policy, CUTOFF, b=4) for policy in ("full", "off")) / 1e9
KEYS = {"max_steps": 5, "val_size": 6, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def losses(records, key="loss"):
    return [record[key] for record in records if key in record]


def assert_equal_runs(one, two):
    for key in ("loss", "eval_loss", "grad_norm", "lr", "epoch"):
        assert losses(two[0], key) == pytest.approx(losses(one[0], key), rel=2e-5), key
    torch.testing.assert_close(two[1], one[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}, {"fsdp": "shard_grad_op"}], ids=str)
def test_two_processes_equal_one(run, keys, patch):
    """18 rows in steps of 8: the last step of an epoch leaves one process without a row."""
    one = run(1, "one", patch=patch, **KEYS, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    two = run(2, "two", patch=patch, **KEYS, **keys, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_equal_runs(one, two)


def one_step_per_epoch(trainer):
    assert trainer.steps_per_epoch == 1 and 2 < len(trainer.data.units) < 18


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=["ddp", "fsdp2"])
def test_packed_rows_of_two_processes_equal_padded_rows_of_one(run, keys):
    """A step is an epoch in both, so each sees the same examples; accumulation and ragged shares included."""
    short = {"max_steps": 4, "val_size": 6, "cutoff_len": 96}
    padded = run(1, "padded", patch=True, **short, per_device_train_batch_size=18)
    rows = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 9}
    packed = run(2, "packed", patch=True, look=one_step_per_epoch, **short, **keys, **rows)
    assert losses(packed[0]) == pytest.approx(losses(padded[0]), rel=2e-6)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=str)
def test_4bit_base(run, keys):
    """QLoRA: FSDP2 shards the bytes of the 4-bit weights and gathers them for fused blocks, which none decline."""
    pytest.importorskip("bitsandbytes")
    quantized = KEYS | {"quantization_bit": 4, "fuse": True}
    one = run(1, "one", patch=True, **quantized, per_device_train_batch_size=4)
    two = run(2, "two", patch=True, **quantized, **keys, per_device_train_batch_size=2)
    assert_equal_runs(one, two)


@pytest.fixture(scope="module")
def reference():
    """What every policy must give: the run of one process that keeps everything, made once."""
    return {}


@pytest.mark.parametrize("policy", ["full", "mlp", "offload", "auto"])
@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=["ddp", "fsdp2"])
def test_checkpointing_policies(run, keys, policy, reference):
    """Under DDP and FSDP2, whose weights are gathered again for the recomputation, a policy changes nothing: two
    processes with it equal one without, and none of its blocks declines."""
    short = KEYS | {"max_steps": 2, "eval_steps": 1}
    if not reference:
        reference["one"] = run(1, "one", patch=True, **short, cutoff_len=CUTOFF, per_device_train_batch_size=4)
    budget = {"activation_budget_gb": MIXED_GB} if policy == "auto" else {}
    asked = {"gradient_checkpointing": policy, "disable_gradient_checkpointing": False, "fuse": True, **budget}
    two = run(2, "two", patch=True, **short, **keys, **asked, cutoff_len=CUTOFF, per_device_train_batch_size=2)
    assert_equal_runs(reference["one"], two)


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=str)
def test_resume_of_two_processes_is_bit_exact(run, keys):
    """Each with its own dropout, whose generators the checkpoint holds."""
    keys = KEYS | keys | {"lora_dropout": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = run(2, "whole", patch=True, **keys)
    run(2, "cut", patch=True, stop=3, **keys)
    on = run(2, "cut", patch=True, **keys)
    assert losses(on[0]) == losses(whole[0])
    torch.testing.assert_close(on[1], whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=str)
def test_resume_into_another_world_size(run, keys, tmp_path, tiny_base):
    """A checkpoint of two processes is a stock adapter, and one process goes on with it."""
    keys = KEYS | keys
    whole = run(1, "whole", **KEYS, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    run(2, "cut", **keys | {"max_steps": 2, "lr_scheduler_type": "constant"}, per_device_train_batch_size=4)
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-2"]
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "cut/checkpoint-2")
    assert len([name for name, _ in stock.named_parameters() if "lora_" in name]) == len(whole[1])
    constant = {"lr_scheduler_type": "constant"}
    straight = run(1, "straight", **KEYS | constant, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    on = run(1, "cut", **KEYS | constant, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_equal_runs(straight, on)
    back = run(2, "cut", **keys | constant | {"max_steps": 7}, per_device_train_batch_size=4)
    assert losses(back[0])[:5] == losses(on[0]) and len(losses(back[0])) == 7


@pytest.mark.parametrize("keys, patch", [({}, False), ({"fsdp": "full_shard"}, True)], ids=["ddp", "fsdp2 patched"])
def test_a_process_without_a_row_counts_for_nothing(run, keys, patch):
    """One row a step, whose mean over trained tokens stock takes; the other process has none, at every step."""
    alone = KEYS | {"max_steps": 3, "max_samples": 9, "val_size": 6, "save_strategy": "no"}
    one = run(1, "one", **alone, per_device_train_batch_size=4)
    two = run(2, "two", patch=patch, **alone, **keys, per_device_train_batch_size=4)
    assert losses(two[0]) == pytest.approx(losses(one[0]), rel=1e-6)
    assert losses(two[0], "grad_norm") == pytest.approx(losses(one[0], "grad_norm"), rel=1e-5)
