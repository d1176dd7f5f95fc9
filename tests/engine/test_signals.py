"""SIGTERM and SIGINT in the middle of a step, an evaluation or a save: what is there afterwards, how soon, the code."""

import os
import signal
import sys
import time
import traceback

import pytest
import torch
from safetensors.torch import load_file

from fuselora import train
from fuselora.engine import checkpoint
from fuselora.engine.errors import run_command
from fuselora.engine.loop_step import Stepper

KEYS = {
    "max_steps": 5,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "val_size": 6,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "lora_dropout": 0.1,
    "check_adapter": "false",
    "plot_loss": False,
    "resume_from_checkpoint": "auto",
}
SECONDS = 30  # what launchers give
# Where the signal comes: in the second micro-batch of step 3, between two batches of its evaluation, between two files
# of a checkpoint. Which one is there afterwards:
SAVED = {"step": 3, "evaluation": 3, "save": 2}


def strike(place, blow):
    """Have ``blow`` called once, in the middle of ``place``."""
    left = [1]

    def once():
        if left.pop() if left else 0:
            blow()

    loss, calls, manifest = Stepper.loss_of, [0], checkpoint.write_manifest

    def spoiled_loss(self, module, examples, tokens):
        result = loss(self, module, examples, tokens)
        calls[0] += self.model.training
        if calls[0] == 6 and place == ("step" if self.model.training else "evaluation"):
            once()
        return result

    def spoiled_manifest(folder):
        if place == "save":
            once()
        manifest(folder)

    Stepper.loss_of, checkpoint.write_manifest = spoiled_loss, spoiled_manifest


@pytest.fixture
def run(tmp_path):
    """run(name, place, blow) trains as the command does, in a copy of this process; returns exit code, seconds."""

    def run(config, place=None, blow=None):
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = open(tmp_path / "said", "w", buffering=1)
                torch.set_num_threads(1)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new process has it, whatever ran before
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                if place:
                    strike(place, blow)
                code = run_command(lambda: train.train(config))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return code, time.monotonic() - began

    return run


@pytest.fixture(scope="module")
def whole():
    return {}


def assert_goes_on_to_the_same_end(run, config, make_config, tmp_path, whole):
    """The run is resumed and ends bit for bit as one that nothing stopped."""
    if not whole:
        straight = make_config(**KEYS | {"output_dir": str(tmp_path / "whole")})
        assert run(straight)[0] == 0, (tmp_path / "said").read_text()
        whole.update(load_file(tmp_path / "whole" / "adapter_model.safetensors"))
    assert run(config)[0] == 0, (tmp_path / "said").read_text()
    end = load_file(os.path.join(config.output_dir, "adapter_model.safetensors"))
    torch.testing.assert_close(end, dict(whole), rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", SAVED)
def test_one_signal(run, make_config, tmp_path, whole, place, number):
    config = make_config(**KEYS)
    code, seconds = run(config, place, lambda: os.kill(os.getpid(), number))
    assert code == 128 + number and seconds < SECONDS, (code, (tmp_path / "said").read_text())
    assert checkpoint.newest_complete(tmp_path / "out").name == f"checkpoint-{SAVED[place]}"
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    assert_goes_on_to_the_same_end(run, config, make_config, tmp_path, whole)


@pytest.mark.parametrize(
    "place, number", [("step", signal.SIGTERM), ("evaluation", signal.SIGINT), ("save", signal.SIGTERM)]
)
def test_a_second_signal_acts_at_once_and_harms_nothing(run, make_config, tmp_path, whole, place, number):
    def twice():
        signal.raise_signal(number)  # to this thread, so that the two are not one by the time Python looks
        signal.raise_signal(number)

    config = make_config(**KEYS)
    code, seconds = run(config, place, twice)
    assert code == 128 + number and seconds < SECONDS, (code, (tmp_path / "said").read_text())
    found = checkpoint.newest_complete(tmp_path / "out")
    assert found is None if place == "save" else found.name == "checkpoint-2"
    assert_goes_on_to_the_same_end(run, config, make_config, tmp_path, whole)
