"""A step that is not finite under ``on_nonfinite: rollback``, and weights that are not finite: what reaches a file."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.test_faults import delayed, spoil_loss

from fuselora.engine import checkpoint, loop_recovery
from fuselora.engine.errors import UserError
from fuselora.engine.loop_callbacks import Callback
from fuselora.engine.loop_faults import MAX_ROLLBACKS

KEYS = {"max_steps": 10, "save_steps": 2, "logging_steps": 3, "lora_dropout": 0.1, "on_nonfinite": "rollback"}
BAD_STEP = 5


def jump(trainer, at, to):
    """The reference: a run that goes from one step to a later one as if those between had been left out."""
    step = trainer.training_step

    def training_step():
        if trainer.step == at:
            trainer.step = to
        step()

    trainer.training_step = training_step


def assert_files_are_finite(folder):
    files = list(folder.glob("*/*.safetensors"))
    assert files
    for path in files:
        for name, tensor in load_file(path).items():
            assert "gauss" in name or torch.isfinite(tensor.double()).all(), (path, name)


@pytest.mark.parametrize("value, late", [(math.nan, False), (math.inf, True)], ids=["at once", "one step later"])
def test_rollback_goes_on_after_the_bad_batch(make_trainer, weights, tmp_path, capsys, value, late):
    """Bit for bit a run that went from the checkpoint's step to the one after the bad step; no batch is taken twice."""
    other = make_trainer(**KEYS, output_dir=str(tmp_path / "other"))
    torch.manual_seed(42)
    trainer = make_trainer(**KEYS)
    if late:
        delayed(other), delayed(trainer)
    after = BAD_STEP + late  # the step that was queued behind the bad one is left out, too
    jump(other, 4, after)
    spoil_loss(trainer, {BAD_STEP}, value)
    taken, take = [], trainer.data.take
    trainer.data.take = lambda step: taken.append(step) or take(step)
    torch.manual_seed(1)
    other.fit()
    generator = torch.get_rng_state()
    torch.manual_seed(1)
    assert trainer.fit() == 0
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(weights(trainer), weights(other), rtol=0, atol=0)
    states = [t.optimizer.state_dict()["state"] for t in (trainer, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert taken == list(range(10))
    rates = [{r["current_steps"]: r["lr"] for r in t.log.records if "lr" in r} for t in (trainer, other)]
    assert rates[1].items() <= rates[0].items()
    assert [r["rolled_back_to"] for r in trainer.log.records if "rolled_back_to" in r] == [4]
    assert (
        f"back to {tmp_path / 'out' / 'checkpoint-4'}; the batches of steps 5 to {after} are left out; "
        f"rollback 1 of at most {MAX_ROLLBACKS}" in capsys.readouterr().out
    )
    assert_files_are_finite(trainer.output_dir)


@pytest.mark.parametrize("stopped", [5, 7], ids=["before the next save", "after it"])
def test_a_rolled_back_run_resumes_bit_for_bit(make_trainer, weights, tmp_path, stopped):
    whole = make_trainer(**KEYS, output_dir=str(tmp_path / "whole"))
    spoil_loss(whole, {BAD_STEP}, math.nan)
    whole.fit()
    keys = KEYS | {"output_dir": str(tmp_path / "cut"), "resume_from_checkpoint": "auto"}
    torch.manual_seed(42)
    cut = make_trainer(**keys)
    spoil_loss(cut, {BAD_STEP}, math.nan)
    step = cut.training_step

    def killed():
        step()
        if cut.step == stopped:
            raise KeyboardInterrupt

    cut.training_step = killed
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    on = make_trainer(**keys)
    spoil_loss(on, {BAD_STEP}, math.nan)
    torch.manual_seed(999)
    on.resume()
    assert (on.step, on.rollbacks) == ((4, 0) if stopped == 5 else (6, 1))
    on.fit()
    assert on.rollbacks == 1
    torch.testing.assert_close(weights(on), weights(whole), rtol=0, atol=0)
    losses = [[(r["current_steps"], r["loss"]) for r in t.log.records if "loss" in r] for t in (on, whole)]
    assert losses[0] == losses[1]


def test_rollbacks_come_to_an_end(make_trainer, capsys):
    """Each goes back to the same state, and the last sentence names the step and where the state before it is."""
    trainer = make_trainer(**KEYS | {"max_steps": 40})
    spoil_loss(trainer, range(3, 99), math.nan)
    with pytest.raises(UserError, match=rf"step {3 + MAX_ROLLBACKS}: expected a finite loss.*checkpoint-"):
        trainer.fit()
    shown = capsys.readouterr().out
    assert [f"rollback {n} of at most {MAX_ROLLBACKS}" in shown for n in range(1, MAX_ROLLBACKS + 2)] == [
        *[True] * MAX_ROLLBACKS,
        False,
    ]
    assert_files_are_finite(trainer.output_dir)


def test_a_damaged_checkpoint_is_passed_over(make_trainer, capsys):
    class Damage(Callback):
        def on_save(self, trainer, folder):
            if folder.name == "checkpoint-4":
                (folder / "optimizer.safetensors").write_bytes(b"")

    trainer = make_trainer(**KEYS)
    trainer.callbacks = [Damage()]
    spoil_loss(trainer, {BAD_STEP}, math.nan)
    assert trainer.fit() == 0
    shown = capsys.readouterr().out
    assert "checkpoint-4: optimizer.safetensors doesn't match" in shown
    assert "checkpoint-2; the batches of steps 3 to 5 are left out" in shown


def test_without_a_checkpoint_the_bad_step_alone_is_left_out(make_trainer, weights, tmp_path, capsys):
    trainer = make_trainer(**KEYS | {"save_strategy": "no", "max_steps": 4, "lora_dropout": 0.0})
    spoil_loss(trainer, {3}, math.nan)
    other = make_trainer(**KEYS | {"max_steps": 4, "lora_dropout": 0.0}, output_dir=str(tmp_path / "other"))
    jump(other, 2, 3)
    assert trainer.fit() == other.fit() == 0
    torch.testing.assert_close(weights(trainer), weights(other), rtol=0, atol=0)
    assert "left out, there is no checkpoint to go back to yet" in capsys.readouterr().out


class Overflow(Callback):
    """An update by finite gradients that carries a weight beyond its dtype."""

    def on_step(self, trainer):
        if trainer.step == 3 and not trainer.rollbacks:
            with torch.no_grad():
                next(p for n, p in trainer.model.named_parameters() if "up_proj.lora_B" in n)[0, 0] = math.inf


@pytest.mark.parametrize("strategy", ["steps", "no"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_not_finite_reach_no_file(make_trainer, policy, strategy):
    trainer = make_trainer(max_steps=3, save_steps=1, save_strategy=strategy, on_nonfinite=policy)
    trainer.callbacks = [Overflow()]
    with pytest.raises(UserError, match=r"step 3: expected finite weights, got .* in .*up_proj.lora_B"):
        trainer.fit()
    names = sorted(path.name for path in trainer.output_dir.glob("*checkpoint-*"))
    assert names == (["checkpoint-1", "checkpoint-2"] if strategy == "steps" else [])


def test_weights_that_are_not_finite_are_rolled_back(make_trainer, capsys):
    trainer = make_trainer(max_steps=5, save_steps=1, on_nonfinite="rollback")
    trainer.callbacks = [Overflow()]
    assert trainer.fit() == 0
    assert "is not finite: back to" in capsys.readouterr().out and loop_recovery.nonfinite_weight(trainer.model) is None
    assert_files_are_finite(trainer.output_dir)
    assert checkpoint.newest_complete(trainer.output_dir).name == "checkpoint-5"


def test_the_log_of_a_stopped_and_resumed_run_counts_its_own_steps(make_trainer, tmp_path):
    """The bad step that stopped the run is none of the resumed run's."""
    keys = {"max_steps": 4, "logging_steps": 4, "save_strategy": "no", "resume_from_checkpoint": "auto"}
    whole = make_trainer(**keys, output_dir=str(tmp_path / "whole"))
    whole.fit()
    torch.manual_seed(42)
    bad = make_trainer(**keys)
    spoil_loss(bad, {3}, math.nan)
    with pytest.raises(UserError, match="checkpoint-2"):
        bad.fit()
    on = make_trainer(**keys)
    on.resume()
    on.fit()
    assert on.log.records[-1]["loss"] == whole.log.records[-1]["loss"]
    assert "skipped_steps" not in on.log.records[-1]
