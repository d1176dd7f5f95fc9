"""Kill -9 at random points, also while a checkpoint is written: the run goes on and ends bit for bit the same."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch

from fuselora.engine import checkpoint

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


def read_log(folder):
    """Records without what depends on the clock."""
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    clock = ("elapsed_time", "remaining_time", "tokens_per_second", "memory_mib")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]
