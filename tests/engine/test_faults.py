"""What goes wrong in a run: numbers that aren't finite, no memory, no room on the disk."""

import errno
import gc
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fuselora.engine import checkpoint, loop_faults, output
from fuselora.engine.errors import UserError
from fuselora.engine.fused_adamw import FusedAdamW
from fuselora.engine.loop_callbacks import Callback, SilentLog
from fuselora.engine.output import check_output_dir, open_output_dir, save_result
from fuselora.engine.patch import patch_model

BAD_STEP = 5
MODULE = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default"


def spoil_loss(trainer, steps, value):
    """Multiply the loss of 1-based ``steps``."""
    loss = trainer.stepper.loss
    trainer.stepper.loss = lambda *args: loss(*args) * (value if trainer.step + 1 in steps else 1)


def spoil_output(trainer, steps, *, gradient):
    """NaN in the output of MODULE, or in the gradient of that output."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone() if gradient else x * math.nan

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    module = trainer.model.get_submodule(MODULE)
    forward = module.forward
    module.forward = lambda x: Spoil.apply(forward(x)) if trainer.step + 1 in steps else forward(x)


def delayed(trainer):
    """As on a GPU: the fused optimizer, verdicts read one step later."""
    groups = [{**g, "params": list(g["params"])} for g in trainer.optimizer.param_groups]
    trainer.optimizer = FusedAdamW(groups)
    trainer.guard.delay = 1


@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step later"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_saves_the_state_before(make_trainer, weights, tmp_path, value, late):
    keys = {"max_steps": 8, "save_strategy": "no", "logging_steps": 8, "lora_dropout": 0.1}
    good = make_trainer(**keys | {"max_steps": BAD_STEP - 1, "lr_scheduler_type": "constant"})
    trainer = make_trainer(**keys | {"output_dir": str(tmp_path / "bad"), "lr_scheduler_type": "constant"})
    for t in (good, trainer):
        if late:
            delayed(t)
    good.fit()
    generator = torch.get_rng_state()
    torch.manual_seed(42)
    trainer = make_trainer(**keys | {"output_dir": str(tmp_path / "bad2"), "lr_scheduler_type": "constant"})
    if late:
        delayed(trainer)
    spoil_loss(trainer, range(BAD_STEP, 99), value)
    rows = trainer.data.take(BAD_STEP - 1).rows
    with pytest.raises(UserError, match=rf"step {BAD_STEP}: .*rows {', '.join(map(str, rows))} of.*checkpoint-4"):
        trainer.fit()
    torch.testing.assert_close(weights(trainer), weights(good), rtol=0, atol=0)
    assert all(float(s["step"]) == BAD_STEP - 1 for s in trainer.optimizer.state.values())
    again = make_trainer(**keys | {"output_dir": str(tmp_path / "bad2"), "lr_scheduler_type": "constant"})
    again.resume()
    assert again.step == BAD_STEP - 1 and torch.equal(torch.get_rng_state(), generator)
    assert again.fit() == 0 and again.step == 8


@pytest.mark.parametrize("gradient", [False, True], ids=["output", "gradient"])
def test_the_first_bad_module_is_named(make_trainer, gradient):
    trainer = make_trainer(max_steps=8, save_steps=2)
    spoil_output(trainer, range(BAD_STEP, 99), gradient=gradient)
    what = f"the output of {MODULE}"
    if gradient:  # it came out of the backward of lora_B, whose input lora_A made
        what = f"the gradient of {what.replace('lora_B', 'lora_A')}"
    with pytest.raises(UserError, match=rf"step {BAD_STEP}.* first in {what} \(Linear\).*checkpoint-4"):
        trainer.fit()


def test_a_weight_that_is_not_finite_is_named(make_trainer):
    trainer = make_trainer(max_steps=3)
    patch_model(trainer.model)
    with torch.no_grad():
        trainer.model.get_submodule("base_model.model.model.norm").weight[3] = math.inf
    with pytest.raises(UserError, match=r"step 1.* first in the weight base_model.model.model.norm.weight"):
        trainer.fit()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "one step later"])
def test_skip_leaves_the_step_out(make_trainer, weights, tmp_path, capsys, late):
    """The weights are those of a run whose bad step updated nothing; the log's mean counts the other steps only."""
    keys = {"max_steps": 6, "save_strategy": "no", "logging_steps": 6, "on_nonfinite": "skip"}
    skipping = make_trainer(**keys)
    other = make_trainer(**keys, output_dir=str(tmp_path / "other"))
    if late:
        delayed(skipping), delayed(other)
    spoil_loss(skipping, {3}, math.nan)
    step, losses = other.stepper.backward, []

    def backward(*args):
        loss = step(*args)
        if other.step != 2:
            losses.append(loss.item())
            return loss
        return loss * math.inf  # seen by the guard alone: the gradients are good

    other.stepper.backward = backward
    assert skipping.fit() == 0 and "step 3: loss or gradient is not finite; skipped (rows" in capsys.readouterr().out
    other.fit()
    torch.testing.assert_close(weights(skipping), weights(other), rtol=0, atol=0)
    record = skipping.log.records[-1]
    assert record["skipped_steps"] == 1 and record["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_the_log_is_json_whatever_the_numbers(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=1, save_strategy="no", on_nonfinite="skip")
    spoil_loss(trainer, (1,), math.nan)
    trainer.fit()
    lines = (trainer.output_dir / "trainer_log.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=pytest.fail)
    assert first["grad_norm"] is None and first["skipped_steps"] == 1 and len(lines) == 2


def test_skipping_gives_up(make_trainer):
    trainer = make_trainer(max_steps=40, on_nonfinite="skip")
    spoil_loss(trainer, range(3, 99), math.nan)
    with pytest.raises(UserError, match=f"step {2 + loop_faults.MAX_SKIPPED}:"):
        trainer.fit()


class NoRoom(Callback):
    """From a step on, passes with more than ``rows`` sequences raise as an allocator does."""

    def __init__(self, trainer, rows, first=0, error=torch.OutOfMemoryError):
        loss = trainer.stepper.loss

        def limited(examples, tokens):
            if trainer.step >= first and len(examples) > rows:
                loss(examples, tokens).backward()  # a part of the gradients is there already
                raise error("CUDA out of memory" if error is torch.OutOfMemoryError else "DefaultCPUAllocator: no")
            return loss(examples, tokens)

        trainer.stepper.loss = limited


def test_out_of_memory_is_one_sentence_and_keeps_the_state(make_trainer):
    trainer = make_trainer(max_steps=6, save_strategy="no")
    NoRoom(trainer, 0, first=3, error=RuntimeError)
    with pytest.raises(UserError, match=r"memory: .*step 4.*halve per_device_train_batch_size.*checkpoint-3"):
        trainer.fit()
    assert checkpoint.find_damage(trainer.output_dir / "checkpoint-3") is None


def test_out_of_memory_goes_on_with_smaller_passes(make_trainer, weights, tmp_path):
    keys = {"max_steps": 5, "logging_steps": 1, "save_strategy": "no"}
    whole = make_trainer(**keys)
    whole.fit()
    short = make_trainer(**keys, output_dir=str(tmp_path / "short"), auto_find_batch_size=True)
    NoRoom(short, 1, first=2)
    assert short.fit() == 0 and short.micro_size == 1
    losses = [[r["loss"] for r in t.log.records if "loss" in r] for t in (short, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(weights(short), weights(whole), rtol=1e-3, atol=1e-5)


def test_running_out_of_memory_keeps_nothing(make_trainer):
    """What the pass that failed had allocated is free again: its graph, its activations, its gradients."""
    trainer = make_trainer(max_steps=5, save_strategy="no", auto_find_batch_size=True)
    trainer.log = SilentLog(5)
    trainer.training_step()
    trainer.training_step()

    def alive():
        gc.collect()
        return sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor)

    before = alive()
    NoRoom(trainer, 2, first=2)
    trainer.training_step()
    assert trainer.micro_size == 2 and alive() <= before


def test_smaller_passes_come_to_an_end(make_trainer, capsys):
    """4, 2, 1, and then a sentence and the state before."""
    trainer = make_trainer(max_steps=6, save_strategy="no", auto_find_batch_size=True)
    NoRoom(trainer, 0, first=3)
    with pytest.raises(UserError, match=r"memory: .*step 4, got none for 1 x .*checkpoint-3"):
        trainer.fit()
    assert capsys.readouterr().out.count("out of memory; going on with") == 2
    assert all(p.grad is None for p in trainer.model.parameters())
    assert checkpoint.find_damage(trainer.output_dir / "checkpoint-3") is None


def test_no_space_by_any_writer(make_trainer, monkeypatch):
    """ENOSPC from each file in turn: an error, the older checkpoint whole, nothing left behind."""
    trainer = make_trainer(max_steps=2, save_steps=2)
    trainer.fit()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in ("save_weights", "save_file", "write_manifest", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, lambda *a, **k: (_ for _ in ()).throw(full))
            trainer.step, trainer.last_checkpoint = 3, None
            with pytest.raises(UserError, match=r"room.*checkpoint-3, got .*No space left.*as they were"):
                trainer.save()
        assert [p.name for p in trainer.output_dir.glob("*checkpoint-*")] == ["checkpoint-2"], name
        assert checkpoint.find_resume(trainer.output_dir, True).name == "checkpoint-2"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("margin", [0, 1 << 20], ids=["while writing", "beforehand"])
def test_a_full_disk(make_trainer, small_disk, monkeypatch, margin):
    monkeypatch.setattr(checkpoint, "MARGIN", margin)
    if not margin:
        monkeypatch.setattr(
            checkpoint.shutil, "disk_usage", lambda path: checkpoint.shutil._ntuple_diskusage(0, 0, 1e9)
        )
    trainer = make_trainer(max_steps=20, save_steps=1, output_dir=str(small_disk / "out"))
    if margin:
        monkeypatch.setattr(checkpoint, "MARGIN", 0)
    with pytest.raises(UserError, match=r"room and the right to write.*(No space left|StorageFull|os error 28)"):
        if margin:
            trainer.training_step()
            trainer.log = None
            monkeypatch.setattr(checkpoint, "MARGIN", margin)
            trainer.save()
        else:
            trainer.fit()
    left = [p.name for p in trainer.output_dir.glob("*checkpoint-*")]
    assert not [name for name in left if name.startswith(".")]
    if not margin:
        assert left and checkpoint.find_resume(trainer.output_dir, True)


def test_a_folder_without_the_right_to_write(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)
    monkeypatch.setattr(
        checkpoint.Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    trainer.training_step()
    with pytest.raises(UserError, match=r"right to write.*Permission denied"):
        trainer.save()


def test_a_folder_without_the_right_to_write_is_refused_at_once(make_config, monkeypatch, tmp_path):
    """By the nearest folder that is there, before anything is loaded."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path))
    with pytest.raises(UserError, match="output_dir: expected the right to write, got none in"):
        check_output_dir(make_config(output_dir=str(tmp_path / "not" / "there")))
    assert asked == [tmp_path]


def test_a_result_is_on_the_disk_before_it_replaces_another(make_trainer, monkeypatch):
    trainer, done = make_trainer(max_steps=1), []
    sync, replace = output.fsync, Path.replace
    monkeypatch.setattr(output, "fsync", lambda path: (done.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (done.append(("replace", path.name)), replace(path, to))[1])
    save_result(trainer.model, trainer.output_dir, trainer.config)
    names = {name for kind, name in done if kind == "replace"}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert {name for _, name in done[: len(names)]} == names and {kind for kind, _ in done[: len(names)]} == {"sync"}
    assert done[-1] == ("sync", trainer.output_dir.name)


@pytest.mark.parametrize("method", ["write_text", "open", "mkdir"])
def test_no_room_outside_checkpoints_is_one_sentence(make_trainer, monkeypatch, method):
    """The configuration, the log, the result."""
    trainer = make_trainer(max_steps=2, save_strategy="no")
    write = {
        "write_text": lambda: open_output_dir(trainer.config),
        "open": trainer.fit,
        "mkdir": lambda: save_result(trainer.model, trainer.output_dir, trainer.config),
    }
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, method, lambda *args, **keys: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="expected room and the right to write, got .*No space left"):
        write[method]()


def test_signal_is_read_by_the_wake_up_thread_only_with_peers():
    signal = loop_faults.StopSignal()
    with signal.listening(peers=True):
        pass
    with signal.listening(peers=False):
        assert signal.number == 0
