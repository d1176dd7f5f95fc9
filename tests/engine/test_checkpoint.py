"""Checkpoints: resume is bit-exact, damage is found and named, the last good one is never lost."""

import json
import random
import time

import numpy
import pytest
import torch

from fuselora.engine import checkpoint, checkpoint_state
from fuselora.engine.config import Config
from fuselora.engine.data import load_data
from fuselora.engine.errors import UserError
from fuselora.engine.loop_callbacks import SilentLog
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model
from fuselora.engine.trainer import Trainer

# Dropout and accumulation, an interval that doesn't divide the log interval, and an epoch edge at step 3.
KEYS = {"max_steps": 8, "lora_dropout": 0.1, "gradient_accumulation_steps": 2, "save_steps": 5, "logging_steps": 3}


@pytest.fixture
def start(make_config, tiny_base, tokenizer, tmp_path):
    def start(out, *, stop_after=None, **keys):
        config = make_config(output_dir=str(tmp_path / out), **KEYS | keys)
        train = load_data(config, tokenizer).train
        open_output_dir(config)
        model = build_model(str(tiny_base), config)
        if config.fuse:
            patch_model(model)
        trainer = Trainer(model, train, [], config, pad_id=tokenizer.pad_token_id)
        step = trainer.training_step

        def training_step():
            step()
            if trainer.step == stop_after:
                raise KeyboardInterrupt  # stands for a kill: nothing runs after it

        trainer.training_step = training_step
        return trainer

    return start


def killed(start, out, after, **keys):
    trainer = start(out, stop_after=after, **keys)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return trainer


def losses(trainer):
    return [(r["current_steps"], r["loss"], r["lr"]) for r in trainer.log.records if "loss" in r]


def assert_same_end(resumed, whole):
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    states = resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(("save_steps", "after"), [(1, 1), (5, 6), (3, 4), (7, 7)])
def test_resume_is_bit_exact(start, save_steps, after):
    whole = start("whole", save_strategy="no")
    whole.fit()
    generator = torch.get_rng_state()
    if after == save_steps:  # killed between the save and the next step
        after += 1
    killed(start, "cut", after, save_steps=save_steps)
    torch.manual_seed(999)
    resumed = start("cut", resume_from_checkpoint=True, save_steps=save_steps)
    resumed.resume()
    resumed.fit()
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("optim", ["auto", "adamw_8bit"])
def test_resume_of_a_fused_run_is_bit_exact(start, optim, packing):
    """Fused dropout draws its masks from a generator of its own kind; that has to come back too."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    keys = {"fuse": True, "optim": optim, "packing": packing, "cutoff_len": 64}
    if optim == "adamw_8bit":
        keys["optim_args"] = {"min_8bit_size": 64}  # below 4096 values states are fp32 otherwise
    whole = start("whole", save_strategy="no", **keys)
    whole.fit()
    killed(start, "cut", 6, **keys)
    torch.manual_seed(999)
    resumed = start("cut", resume_from_checkpoint=True, **keys)
    resumed.resume()
    resumed.fit()
    assert_same_end(resumed, whole)


def test_resume_without_the_generators_would_differ(start, monkeypatch):
    """The test above can fail: with another dropout mask the weights are others."""
    whole = start("whole", save_strategy="no")
    whole.fit()
    killed(start, "cut", 6)
    monkeypatch.setattr(checkpoint_state, "restore_generators", lambda *state: None)
    resumed = start("cut", resume_from_checkpoint=True)
    resumed.resume()
    resumed.fit()
    assert losses(resumed) != losses(whole)


def test_all_generators_come_back(start):
    trainer = start("out")
    random.seed(1)
    numpy.random.seed(2)
    folder = checkpoint.save_checkpoint(trainer.output_dir, trainer.model, trainer.optimizer, {"step": 1, "run": {}})
    drawn = random.random(), numpy.random.rand(), torch.rand(1)
    checkpoint.load_checkpoint(folder, trainer.model, trainer.optimizer, {})
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == drawn


def test_a_checkpoint_is_an_adapter_for_stock_peft(start, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = start("out", additional_target="lm_head")
    trainer.fit()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), trainer.last_checkpoint)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.fixture
def two(start):
    """An output folder with checkpoint-5 and checkpoint-8."""
    trainer = start("out")
    trainer.fit()
    return trainer.output_dir


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "delete": lambda path: path.unlink(),
    "swap": lambda path: path.write_bytes((path.parent.parent / "checkpoint-5" / path.name).read_bytes()),
}


def test_damage_is_named_and_skipped(two, capsys):
    newest, older = two / "checkpoint-8", two / "checkpoint-5"
    assert checkpoint.find_resume(two, True) == newest
    files = sorted(path.name for path in newest.iterdir())
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "manifest.json"} < set(files)
    for name in files:
        good = (newest / name).read_bytes()
        for kind, damage in DAMAGE.items():
            damage(newest / name)
            if kind == "swap" and (newest / name).read_bytes() == good:
                assert name in ("adapter_config.json", "README.md"), name  # the same at every step
                continue
            found = checkpoint.find_damage(newest)
            assert found is not None, (name, kind)
            assert name in found or name == "manifest.json", (name, kind, found)
            assert checkpoint.find_resume(two, True) == older
            assert "checkpoint-8" in capsys.readouterr().out
            (newest / name).write_bytes(good)
        assert checkpoint.find_damage(newest) is None


def test_damaged_checkpoint_asked_for_by_name(two):
    flip(two / "checkpoint-8" / "optimizer.safetensors")
    with pytest.raises(UserError, match="optimizer.safetensors"):
        checkpoint.find_resume(two, str(two / "checkpoint-8"))
    with pytest.raises(UserError, match="not a folder"):
        checkpoint.find_resume(two, str(two / "checkpoint-9"))


def test_no_good_checkpoint(two):
    for folder in two.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="resume_from_checkpoint"):
        checkpoint.find_resume(two, True)


def test_manifest_can_not_point_outside(two):
    manifest = two / "checkpoint-8" / "manifest.json"
    content = json.loads(manifest.read_text())
    (two / "outside").write_text("x")
    content["files"]["../outside"] = checkpoint._sha256(two / "outside")
    manifest.write_text(json.dumps(content))
    assert "outside" in checkpoint.find_damage(two / "checkpoint-8")


def test_crash_while_saving_leaves_the_previous_one(start, monkeypatch, two):
    trainer = start("crash", save_steps=2)
    publish = checkpoint._publish

    def crash(staging, folder):
        if folder.name == "checkpoint-4":
            raise OSError("disk full")
        publish(staging, folder)

    monkeypatch.setattr(checkpoint, "_publish", crash)
    with pytest.raises(UserError, match="room.*checkpoint-4, got disk full"):
        trainer.fit()
    assert checkpoint.find_resume(trainer.output_dir, True).name == "checkpoint-2"
    monkeypatch.undo()
    resumed = start("crash", save_steps=2, resume_from_checkpoint=True)
    resumed.resume()
    resumed.fit()
    assert checkpoint.find_resume(resumed.output_dir, True).name == "checkpoint-8"


def test_limit_keeps_the_newest_and_the_one_just_written(start):
    trainer = start("out", save_steps=2, save_total_limit=2)
    (trainer.output_dir / "checkpoint-99").mkdir()  # a damaged one of a later step must not push out good ones
    trainer.fit()
    assert checkpoint.find_resume(trainer.output_dir, True).name == "checkpoint-8"
    for limit, left in ((1, {"checkpoint-8"}), (2, {"checkpoint-6", "checkpoint-8"})):
        trainer = start(f"limit{limit}", save_steps=2, save_total_limit=limit)
        trainer.fit()
        assert {p.name for p in trainer.output_dir.glob("checkpoint-*")} == left


def test_going_on_from_an_earlier_step_leaves_the_later_branch(start, two, capsys):
    """`auto` must not end on the branch that was left, were it the newer one; nothing is deleted."""
    for name, again in (("abandoned-checkpoint-8", 6), ("abandoned-checkpoint-8-2", 7)):
        later = {path.name: path.read_bytes() for path in (two / "checkpoint-8").iterdir()}
        resumed = start("out", resume_from_checkpoint=str(two / "checkpoint-5"), stop_after=again)
        resumed.resume()
        assert checkpoint.find_resume(two, "auto").name == "checkpoint-8"  # until the run begins
        with pytest.raises(KeyboardInterrupt):
            resumed.fit()
        assert f"a checkpoint of a later step is now {two / name}" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in (two / name).iterdir()} == later
        assert checkpoint.find_resume(two, "auto").name == "checkpoint-5"
        on = start("out", resume_from_checkpoint="auto")
        on.resume()
        on.fit()
        assert on.last_checkpoint.name == "checkpoint-8"


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size"),
        ({"data_seed": 7}, "data_seed"),
        ({"lora_alpha": 3}, "lora_alpha"),
        ({"lora_rank": 2, "lora_alpha": 8}, "weights"),
        ({"max_samples": 20}, "training data"),
    ],
)
def test_another_run_is_refused(start, keys, word):
    killed(start, "out", 6)
    other = start("out", resume_from_checkpoint=True, **keys)
    before = {name: p.clone() for name, p in other.model.named_parameters()}
    with pytest.raises(UserError, match=word):
        other.resume()
    assert all(torch.equal(p, before[name]) for name, p in other.model.named_parameters())


def test_another_base_of_the_same_shape_is_refused(start):
    killed(start, "out", 6)
    other = start("out", resume_from_checkpoint=True)
    with torch.no_grad():
        next(p for p in other.model.parameters() if not p.requires_grad).mul_(1.01)
    with pytest.raises(UserError, match="base and adapter weights"):
        other.resume()


def test_what_a_save_costs(start, tmp_path):
    """In processor time: hashing at 500 MB/s or more, and a save at most 5 % of the steps between two."""
    trainer = start("out")
    trainer.log = SilentLog(8)
    trainer.training_step()
    began = time.process_time()
    for _ in range(5):
        trainer.training_step()
    step = (time.process_time() - began) / 5
    began = time.process_time()
    trainer.save()
    assert time.process_time() - began <= 0.05 * Config.save_steps * step
    (tmp_path / "large").write_bytes(bytes(64_000_000))
    began = time.process_time()
    checkpoint._sha256(tmp_path / "large")
    assert 64 / (time.process_time() - began) >= 500
