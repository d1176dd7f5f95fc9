"""DeepSpeed's ZeRO with its own configuration: the losses and weights of one process, one checkpoint for any engine."""

import math
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.distributed.test_equal import KEYS, assert_equal_runs, losses

from fuselora.engine import checkpoint

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'fuselora[deepspeed]'")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, in minutes


def stage(number):
    """As in LLaMA-Factory's examples/deepspeed, in buckets for a model of 24 x 24."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": number,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,  # nothing stays gathered, however small
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_two_processes_equal_one(run, number, patch):
    one = run(1, "one", patch=patch, **KEYS, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    keys = KEYS | {"deepspeed": stage(number), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    two = run(2, "two", patch=patch, declined="lm_head" if number == 3 else None, look=in_parts(number), **keys)
    assert_equal_runs(one, two)


def in_parts(number):
    """Under stage 3 a process holds no weight as a whole between steps."""

    def look(trainer):
        assert all((p.numel() == 0) == (number == 3) for p in trainer.model.parameters())

    return look


@pytest.mark.parametrize("number", [2, 3])
def test_resume_is_bit_exact_and_goes_on_without_deepspeed(run, number, tmp_path):
    """The checkpoint is ours: two processes under ZeRO go on from it, and so does one without."""
    size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    keys = KEYS | size | {"deepspeed": stage(number), "lora_dropout": 0.1, "weight_decay": 0.1}
    whole = run(2, "whole", **keys)
    run(2, "cut", stop=3, **keys)
    assert sorted(p.name for p in (tmp_path / "cut").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    on = run(2, "cut", **keys)
    assert losses(on[0]) == losses(whole[0])
    torch.testing.assert_close(on[1], whole[1], rtol=0, atol=0)

    keys |= {"lora_dropout": 0.0}
    straight = run(1, "straight", **keys | {"deepspeed": None, "per_device_train_batch_size": 4})
    run(2, "half", stop=3, **keys)
    other = run(1, "half", **keys | {"deepspeed": None, "per_device_train_batch_size": 4})
    assert losses(other[0]) == pytest.approx(losses(straight[0]), rel=2e-5)
    torch.testing.assert_close(other[1], straight[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("number", [2, 3])
def test_recomputed_layers(run, number, reentrant):
    keys = KEYS | {"disable_gradient_checkpointing": False, "use_reentrant_gc": reentrant}
    one = run(1, "one", patch=True, **keys, per_device_train_batch_size=4)
    two = run(2, "two", patch=True, declined="lm_head", **keys, per_device_train_batch_size=2, deepspeed=stage(number))
    assert_equal_runs(one, two)


@pytest.mark.parametrize("number", [2, 3])
def test_bf16_has_fp32_masters_and_exact_rope(run, number):
    keys = KEYS | {"bf16": True, "save_strategy": "no"}
    one = run(1, "one", patch=True, **keys, per_device_train_batch_size=4)
    two = run(2, "two", patch=True, declined="lm_head", **keys, per_device_train_batch_size=2, deepspeed=stage(number))
    assert losses(two[0]) == pytest.approx(losses(one[0]), rel=5e-3)
    assert all(p.dtype == torch.float32 for p in two[1].values())
    assert any((p != p.bfloat16().float()).any() for p in two[1].values())


def test_4bit_base(run):
    pytest.importorskip("bitsandbytes")
    quantized = KEYS | {"quantization_bit": 4, "fuse": True}
    one = run(1, "one", patch=True, **quantized, per_device_train_batch_size=4)
    two = run(2, "two", patch=True, **quantized, deepspeed=stage(2), per_device_train_batch_size=2)
    assert_equal_runs(one, two)


@pytest.mark.parametrize("number", [2, 3])
def test_one_process_and_offload(run, number):
    offload = {part: {"device": "cpu"} for part in ("offload_optimizer", "offload_param")[: number - 1]}
    given = stage(number)
    given["zero_optimization"] |= offload
    one = run(1, "one", **KEYS, per_device_train_batch_size=4)
    zero = run(1, "zero", **KEYS, per_device_train_batch_size=4, deepspeed=given)
    assert_equal_runs(one, zero)


def test_buffers_keep_their_dtype(run):
    """The frequencies of RoPE stay fp32 under bf16."""

    def look(trainer):
        assert {b.dtype for name, b in trainer.model.named_buffers() if "inv_freq" in name} == {torch.float32}

    run(1, look=look, max_steps=1, bf16=True, deepspeed=stage(3))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("number", [2, 3])
def test_nan_in_one_process_updates_nothing(run, number, skip, tmp_path):
    def look(trainer):
        loss = trainer.stepper.loss

        def spoiled(*args):
            bad = trainer.world.rank == 1 and trainer.step == 2
            return loss(*args) * (math.nan if bad else 1)

        if not hasattr(trainer, "log"):
            trainer.stepper.loss = spoiled

    keys = {"max_steps": 4, "deepspeed": stage(number), "per_device_train_batch_size": 2, "save_steps": 1}
    if skip:
        records, _ = run(2, look=look, on_nonfinite="skip", **keys)
        assert [r.get("skipped_steps", 0) for r in records if "lr" in r] == [0, 0, 1, 0]
        before, after = (load_file(tmp_path / f"run/checkpoint-{n}/adapter_model.safetensors") for n in (2, 3))
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    else:
        with pytest.raises(AssertionError, match="2, 2"):  # exit codes
            run(2, look=look, **keys)
        assert "step 3: expected a finite loss" in (tmp_path / "stderr0").read_text()
        assert checkpoint.find_resume(tmp_path / "run", "auto").name == "checkpoint-2"


@pytest.mark.parametrize("number", [2, 3])
def test_rollback_takes_weights_and_states_back(run, number, tmp_path):
    """Step 6 is bad in one process: both go back to the checkpoint of step 4, which is then that of step 6, too."""

    def look(trainer):
        loss = trainer.stepper.loss
        if not hasattr(trainer, "log"):
            trainer.stepper.loss = lambda *args: (
                loss(*args) * (math.nan if (trainer.world.rank, trainer.step) == (1, 5) else 1)
            )

    keys = {"max_steps": 8, "deepspeed": stage(number), "per_device_train_batch_size": 2, "save_steps": 2}
    records, _ = run(2, look=look, on_nonfinite="rollback", **keys)
    assert [r["rolled_back_to"] for r in records if "rolled_back_to" in r] == [4]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        four, six, eight = (load_file(tmp_path / f"run/checkpoint-{step}" / name) for step in (4, 6, 8))
        torch.testing.assert_close(four, six, rtol=0, atol=0)
        assert any(not torch.equal(six[key], tensor) for key, tensor in eight.items())


@pytest.mark.parametrize("number", [2, 3])
def test_a_killed_process_ends_the_job_and_the_next_goes_on(run, number, tmp_path):
    def look(trainer):
        step = trainer.training_step

        def training_step():
            if (trainer.world.rank, trainer.step) == (1, 3):
                os.kill(os.getpid(), signal.SIGKILL)
            step()

        trainer.training_step = training_step

    keys = {"max_steps": 5, "deepspeed": stage(number), "per_device_train_batch_size": 2, "save_steps": 2}
    began = time.monotonic()
    with pytest.raises(AssertionError, match="2, -9"):  # exit codes
        run(2, look=look, **keys)
    assert time.monotonic() - began < 30
    error = (tmp_path / "stderr0").read_text()
    assert "processes: expected all 2 to stay, got one that ended or hangs" in error and "checkpoint-2" in error
    records, _ = run(2, **keys)
    assert [r["current_steps"] for r in records if "loss" in r] == [1, 2, 3, 4, 5]
