"""Many thousand steps of the trainer on a model of a few thousand weights: does anything grow or slow down?

    python bench/soak.py steps=10000        one JSON object: growth of memory, files, threads; drift of the step's time

A run of this length logs, evaluates and saves every hundred steps, so what those leave behind adds up too. Samples of
the first fifth are warm-up: allocators, caches and the first files. Resident memory is the median of the last fifth of
the samples over the median of the first fifth after warm-up; step time the same, as processor time of this process,
which other processes on the machine change least. The thresholds are those of the project's design. SIGTERM ends a run
early, with its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.loop_callbacks import Callback
from fuselora.engine.model import prepare_method
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model
from fuselora.engine.trainer import Trainer

EVERY = 50  # steps between samples; twice as many between log lines, evaluations and checkpoints
LIMITS = {"rss_growth": 0.01, "files_growth": 0, "threads_growth": 0, "step_time_drift": 0.02}


class Sampler(Callback):
    """Resident bytes, open files, threads and processor seconds, every ``every`` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[tuple[int, int, int, float]] = []
        self.began = time.process_time()

    def on_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every:
            return
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        now = time.process_time()
        self.samples.append((pages * os.sysconf("SC_PAGE_SIZE"), files, threads, (now - self.began) / self.every))
        self.began = time.process_time()


def growth(samples: list[tuple[int, int, int, float]]) -> dict[str, float]:
    """What ``LIMITS`` bounds, from the samples of a run."""
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]

    def medians(column: int) -> tuple[float, float]:
        return statistics.median(s[column] for s in early), statistics.median(s[column] for s in late)

    (rss, rss_late), (step, step_late) = medians(0), medians(3)
    files, threads = (max(s[i] for s in late) - max(s[i] for s in early) for i in (1, 2))
    return {
        "rss_growth": rss_late / rss - 1,
        "files_growth": files,
        "threads_growth": threads,
        "step_time_drift": step_late / step - 1,
    }


def soak(steps: int, folder: str, every: int = EVERY) -> dict[str, Any]:
    """Train for ``steps`` steps; returns the growth, and which limits it exceeds."""
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    config = Config(
        model_name_or_path=folder,
        dataset="rows",
        output_dir=f"{folder}/out",
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=2 * every,
        save_steps=2 * every,
        save_total_limit=2,
        val_size=8,
        eval_strategy="steps",
        eval_steps=2 * every,
        lora_dropout=0.1,
        learning_rate=1e-3,
        disable_gradient_checkpointing=True,
        use_cpu=True,
    )
    model = patch_model(prepare_method(base, folder, config))
    rows = [Example([(7 * i + j) % 128 for j in range(12 + i % 21)], list(range(12 + i % 21))) for i in range(72)]
    open_output_dir(config)
    sampler = Sampler(every)
    trainer = Trainer(model, rows[8:], rows[:8], config, pad_id=0, callbacks=[sampler])
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        trainer.fit()
    found = growth(sampler.samples)
    over = [name for name, limit in LIMITS.items() if found[name] > limit]
    return {"steps": trainer.step, "rss_mib": round(sampler.samples[-1][0] / 2**20, 1)} | found | {"over": over}


def main(arguments: list[str]) -> int:
    steps = int(dict(argument.split("=") for argument in arguments).get("steps", 10_000))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(steps, folder)
    print(json.dumps(result, indent=1))
    return 1 if result["over"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
