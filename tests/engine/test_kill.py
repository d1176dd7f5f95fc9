"""Kill -9 at random points, also while a checkpoint is written: the run goes on and ends bit for bit the same.

A single save is killed at 200 points: at byte offsets of its files (a limit on their size, whose signal is not caught),
at everything it does to files and folders, and by the clock.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from functools import partial

import pytest
import torch

from fuselora.engine import checkpoint
from fuselora.engine.loop_callbacks import SilentLog

KEYS = {
    "max_steps": 40,
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "lora_dropout": 0.1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "resume_from_checkpoint": "auto",
}
KILLS = 20
POINTS, EVENTS = 200, 39  # a save does so much to files and folders


@pytest.fixture
def start(make_trainer, tmp_path):
    """start(name) makes a trainer afresh and a process that trains it; the process is ready to be started."""
    torch.set_num_threads(1)
    trainers = {name: make_trainer(**KEYS, output_dir=str(tmp_path / name)) for name in ("whole", "killed")}

    def start(name, before=lambda: None):
        trainer = trainers[name]  # forked below, so every process begins with the same one

        def child():
            sys.stdout = open(os.devnull, "w")
            torch.manual_seed(os.getpid())
            before()
            trainer.resume()
            if not trainer.resumed:  # as building the model leaves it; Python seeds its generator anew in a fork
                torch.manual_seed(42)
                random.seed(42)
            trainer.fit()
            os._exit(0)

        return multiprocessing.get_context("fork").Process(target=child)

    return start


def kill_at_file_event(number):
    """An audit hook that kills the process at the n-th thing it does to files; most of them belong to a save."""
    left = [number]

    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def test_a_run_killed_twenty_times_ends_the_same(start, tmp_path):
    whole = start("whole")
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    draw, killed, while_saving, out = random.Random(7), 0, 0, tmp_path / "killed"
    while True:
        by_file = killed % 2 == 0
        before = kill_at_file_event(draw.randrange(3, 60)) if by_file and killed < KILLS else (lambda: None)
        process = start("killed", before)
        process.start()
        if not by_file and killed < KILLS:
            time.sleep(draw.uniform(0.0, 0.15))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        while_saving += any(out.glob(".checkpoint-*.tmp"))
    assert killed == KILLS and while_saving >= 3
    assert not list(out.glob(".checkpoint-*"))
    ends = [tmp_path / name / "checkpoint-40" for name in ("whole", "killed")]
    assert all(checkpoint.find_damage(end) is None for end in ends)
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-39", "checkpoint-40"]
    logs = [read_log(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0] == logs[1] and len(logs[0]) == 14


def at_byte(offset):
    """End the process where a file would grow beyond ``offset``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))


def at_time(seconds):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def in_a_fork(act):
    """Run ``act`` in a copy of this process; returns the signal that ended it, 0 for none."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        torch.set_num_threads(1)  # those of the parent do not exist here
        try:
            act()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def test_a_save_killed_at_two_hundred_points(make_trainer, tmp_path):
    """The same step again (two renames) or the next one, after which retention deletes the older: there is always a
    complete checkpoint, of the last two steps, and no half one is ever chosen.
    """
    trainer = make_trainer(max_steps=2, save_total_limit=1, output_dir=str(tmp_path / "good"))
    trainer.training_step()
    trainer.log = SilentLog(2)
    trainer.save()
    longest = max(path.stat().st_size for path in trainer.last_checkpoint.iterdir())
    trainer.output_dir = tmp_path / "out"
    began = time.monotonic()
    trainer.last_checkpoint = None
    trainer.save()
    seconds = time.monotonic() - began
    draw, killed, found, torn = random.Random(11), 0, set(), 0
    for number in range(POINTS):
        shutil.rmtree(trainer.output_dir)
        shutil.copytree(tmp_path / "good", trainer.output_dir)
        if number < 2 * EVENTS:
            fault = kill_at_file_event(number // 2 + 1)
        elif number % 4 < 2:
            fault = partial(at_byte, draw.randrange(1, longest))
        else:
            fault = partial(at_time, draw.uniform(1e-4, 1.2 * seconds))

        def save(fault=fault, step=1 + number % 2):
            trainer.step, trainer.last_checkpoint = step, None
            fault()
            trainer.save()

        killed += in_a_fork(save) != 0
        torn += any(trainer.output_dir.glob(".checkpoint-*"))
        folder = checkpoint.find_resume(trainer.output_dir, "auto")
        assert folder is not None and folder.name in ("checkpoint-1", "checkpoint-2"), number
        found.add(folder.name)
        if number % 10 == 0:
            trainer.step, trainer.last_checkpoint = 2, None
            trainer.save()
            assert [path.name for path in trainer.output_dir.glob("*checkpoint-*")] == ["checkpoint-2"], number
    assert killed >= 0.8 * POINTS and torn >= 0.4 * POINTS and len(found) == 2, (killed, torn)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_during_the_save_leaves_the_previous_one(make_trainer, monkeypatch, number):
    """The first lets the step end and be saved, the second acts at once, here between the files of that save."""
    trainer = make_trainer(max_steps=6, save_steps=2)
    write = checkpoint.write_manifest

    def twice(folder):
        if folder.name == ".checkpoint-3.tmp":
            os.kill(os.getpid(), number)
        write(folder)

    def interrupted(step=trainer.training_step):
        step()
        if trainer.step == 3:
            os.kill(os.getpid(), number)

    def train():
        monkeypatch.setattr(checkpoint, "write_manifest", twice)
        trainer.training_step = interrupted
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        trainer.fit()

    assert in_a_fork(train) == number
    assert (trainer.output_dir / ".checkpoint-3.tmp").is_dir()
    assert checkpoint.find_resume(trainer.output_dir, "auto").name == "checkpoint-2"


def read_log(folder):
    """Records without what depends on the clock."""
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    clock = ("elapsed_time", "remaining_time", "tokens_per_second", "memory_mib")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
