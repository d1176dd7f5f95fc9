"""One process of two dies, hangs, is told to stop, or meets NaN: the job ends, in time, with a sentence."""

import json
import math
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from fuselora.engine import checkpoint, distributed, loop_faults
from fuselora.engine.data import load_data
from fuselora.engine.loop_callbacks import Callback
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.trainer import Trainer


class At(Callback):
    """Call ``act`` in one process after a step."""

    def __init__(self, rank, step, act):
        self.rank, self.step, self.act = rank, step, act

    def on_step(self, trainer):
        if (trainer.world.rank, trainer.step) == (self.rank, self.step):
            self.act()


@pytest.fixture
def run(make_config, tiny_base, tokenizer, launch, tmp_path):
    """run(callback) trains in two processes; returns exit codes, seconds, standard errors and the output folder."""

    def run(callback, *, damage=None, **keys):
        config = make_config(max_steps=8, logging_steps=1, save_steps=2, per_device_train_batch_size=2, **keys)
        train = load_data(config, tokenizer).train

        def one(rank):
            world = distributed.start(config)
            model = build_model(str(tiny_base), config)
            trainer = Trainer(model, train, [], config, pad_id=tokenizer.pad_token_id, world=world)
            trainer.callbacks = [callback]
            if damage:
                damage(trainer)
            trainer.resume()
            if world.main:
                open_output_dir(config, resumed=trainer.resumed)
            return trainer.fit()

        return *launch(2, one), tmp_path / "out"

    return run


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(run, rank, keys):
    codes, seconds, errors, out = run(At(rank, 3, lambda: os.kill(os.getpid(), signal.SIGKILL)), **keys)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 2 and seconds < 30
    assert (
        f"processes: expected all 2 to stay, got one that ended or hangs, seen by rank {1 - rank}" in errors[1 - rank]
    )
    assert "checkpoint-2" in errors[1 - rank] and checkpoint.find_resume(out, "auto").name == "checkpoint-2"
    codes, _, errors, out = run(Callback(), **keys)
    assert codes == [0, 0], errors
    assert checkpoint.find_resume(out, "auto").name == "checkpoint-8"
    records = [json.loads(line) for line in (out / "trainer_log.jsonl").open()]
    assert [record["current_steps"] for record in records] == list(range(1, 9))


def test_a_signal_to_one_process_stops_both_at_one_step(run):
    codes, _, errors, out = run(At(1, 3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert codes == [signal.SIGTERM] * 2, errors
    assert checkpoint.find_resume(out, "auto").name == "checkpoint-3"


def test_a_process_that_waits_for_a_hanging_one_ends_by_a_signal(run, monkeypatch):
    """As launchers do it: SIGTERM to all. The hanging one is taken for dead to Python, the other waits in gloo."""
    monkeypatch.setattr(loop_faults, "GRACE", 0.5)
    parent = os.getpid()

    def hang():
        time.sleep(0.5)
        for pid in (int(p) for p in os.listdir("/proc") if p.isdigit()):
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split(") ")[-1].split()[1] == str(parent):
                    os.kill(pid, signal.SIGTERM)
        time.sleep(3600)

    codes, seconds, errors, _ = run(At(1, 3, hang))
    assert codes == [128 + signal.SIGTERM] * 2 and seconds < 20, errors
    assert "while waiting for another process" in errors[0]


def test_nan_in_one_process_stops_both_and_names_its_module(run):
    def damage(trainer):
        weight = trainer.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer").weight

        plan = trainer._plan

        def spoil(step):
            if trainer.world.rank == 1 and step >= 4:
                with torch.no_grad():
                    weight[0, 0] = float("nan")
            return plan(step)

        trainer._plan = spoil

    codes, _, errors, out = run(Callback(), damage=damage)
    assert codes == [2, 2], errors
    for error in errors:
        assert "step 5: expected a finite loss" in error and "layers.1.mlp.up_proj.base_layer.weight" in error, error
        assert "checkpoint-4" in error
    assert checkpoint.find_resume(out, "auto").name == "checkpoint-4"


@pytest.mark.parametrize("keys", [{}, {"fsdp": "full_shard"}], ids=["ddp", "fsdp2"])
def test_nan_in_one_process_rolls_both_back(run, keys):
    """To the same checkpoint, whose weights the next one holds, and on with the batches after the bad one."""

    def damage(trainer):
        loss = trainer.stepper.loss
        trainer.stepper.loss = lambda *args: (
            loss(*args) * (math.nan if (trainer.world.rank, trainer.step) == (1, 5) else 1)
        )

    codes, _, errors, out = run(
        Callback(), damage=damage, on_nonfinite="rollback", lr_scheduler_type="constant", **keys
    )
    assert codes == [0, 0], errors
    weights = [load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6, 8)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert any(not torch.equal(weights[1][name], tensor) for name, tensor in weights[2].items())
    assert all(torch.isfinite(tensor).all() for tensor in weights[2].values())
    records = [json.loads(line) for line in (out / "trainer_log.jsonl").open()]
    assert [record["rolled_back_to"] for record in records if "rolled_back_to" in record] == [4]
