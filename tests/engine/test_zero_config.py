"""What becomes of a DeepSpeed configuration; nothing of DeepSpeed is needed for it."""

import json

import pytest

from fuselora.engine import zero_config
from fuselora.engine.errors import UserError

STAGE_2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True},
}
STAGE_3 = STAGE_2 | {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": "auto"}}


@pytest.fixture
def read(make_config, monkeypatch):
    monkeypatch.setattr(zero_config.importlib.util, "find_spec", lambda name: True)
    return lambda given, **keys: zero_config.read(make_config(deepspeed=given, **keys))


def test_auto_is_filled_in(make_config):
    config = make_config(bf16=True, gradient_accumulation_steps=3, max_grad_norm=0.5)
    filled = zero_config.complete(STAGE_3, config, hidden=10, processes=2)
    assert filled["train_batch_size"] == 24 and filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 3 and filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": True} and filled["data_types"] == {"grad_accum_dtype": "fp32"}
    assert filled["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 100}
    assert not {"optimizer", "fp16"} & set(filled) and "auto" not in json.dumps(filled)
    same = zero_config.complete(STAGE_2, config, hidden=10, processes=2)
    assert same["zero_optimization"] == STAGE_2["zero_optimization"]


def test_a_file_is_read_and_stage_0_is_ddp(read, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(STAGE_2))
    assert read(str(path)) == STAGE_2
    assert read(STAGE_2 | {"zero_optimization": {"stage": 0}}) is None


@pytest.mark.parametrize(
    ("given", "keys", "says"),
    [
        ("ds.json", {}, "not a file"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage of 0 to 3"),
        (STAGE_2 | {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, {}, "no optimizer of its own"),
        (STAGE_2 | {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}}, {}, "lr_scheduler_type"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {}, "offload_param"),
        (STAGE_2 | {"fp16": {"enabled": True}}, {}, "bf16 or fp32, got fp16"),
        (STAGE_2, {"fp16": True}, "bf16 or fp32, got fp16"),
        (STAGE_2, {"optim": "adamw_8bit"}, "optim"),
        (STAGE_2, {"pissa_init": True}, "pissa_init"),
        (STAGE_2, {"fsdp": "full_shard"}, "fsdp"),
        (STAGE_3, {"quantization_bit": 4}, "set stage 2"),
    ],
)
def test_what_is_not_carried_through_is_refused(read, given, keys, says):
    with pytest.raises(UserError, match=says):
        read(given, **keys)


def test_a_missing_library_is_named(make_config, monkeypatch):
    monkeypatch.setattr(zero_config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .fuselora\[deepspeed\]"):
        zero_config.read(make_config(deepspeed=STAGE_2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps 1"),
        ({"bf16": {"enabled": True}}, "bf16 false"),
    ],
)
def test_contradictions_are_refused(make_config, change, says):
    with pytest.raises(UserError, match=says):
        zero_config.complete(STAGE_2 | change, make_config(), hidden=10, processes=1)
