"""What the training loop costs over the bare step: the same model, batch and optimizer, in turns in one process.

    python bench/loop_overhead.py --preset cpu --layers 2 --rounds 15

    bare    forward with labels, backward, AdamW, zero_grad, as bench/train_step.py times it
    loop    Trainer.training_step: choosing, collating and moving the examples, schedule, the guard against NaN, the
            generators' states for going back, clipping, and a log line every ``logging_steps``

Reported are the medians and minima of wall and processor time and their ratios. The target is 3 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import models
import presets
import timing
import torch
from models import LoraShape

from fuselora.engine.chat import Example
from fuselora.engine.config import Config
from fuselora.engine.metrics import RunLog
from fuselora.engine.trainer import Trainer


def build(args: argparse.Namespace, out: Path) -> tuple[timing.Trainer, Trainer]:
    """Both sides on models of equal weights, with the same examples."""
    config, batch, seq = presets.load_config(args.preset, None)
    config = presets.with_layers(config, args.layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = models.parse_side("fuselora")
    base = models.build_base(config, torch.float32 if device.type == "cpu" else torch.bfloat16, device, seed=1)
    bare, looped = (models.build_side(base, side, LoraShape(), checkpointing=False, seed=1) for _ in range(2))
    ids = torch.randint(3, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(3))
    examples = [Example(row, row) for row in ids.tolist()] * 64
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    settings = Config(
        model_name_or_path="bench",
        dataset="bench",
        output_dir=str(out),
        per_device_train_batch_size=batch,
        max_steps=10_000,
        learning_rate=1e-5,
        logging_steps=args.logging_steps,
        save_strategy="no",
        optim="auto" if device.type == "cuda" else "adamw_torch_fused",  # the bare step's
    )
    trainer = Trainer(looped, examples, [], settings, pad_id=0)
    trainer.log = RunLog(out, total_steps=trainer.total_steps)
    return timing.Trainer(bare, side, {name: t.to(device) for name, t in inputs.items()}), trainer


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="at most this many; 0: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--logging-steps", type=int, default=10)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as out:
        bare, trainer = build(args, Path(out))

        def looped() -> None:
            trainer.training_step()
            if trainer.step % args.logging_steps == 0:
                trainer._log_window()

        for _ in range(2):
            bare.step(), looped()
        times: dict[str, list[tuple[float, float]]] = {"bare": [], "loop": []}
        for i in range(args.rounds):
            for name in ("bare", "loop") if i % 2 == 0 else ("loop", "bare"):
                times[name].append(timed(bare.step if name == "bare" else looped))
    result = {}
    for at, what in enumerate(("wall", "processor")):
        for statistic in (statistics.median, min):
            a, b = (statistic([t[at] for t in times[name]]) for name in ("bare", "loop"))
            label = f"{what} {'median' if statistic is statistics.median else 'minimum'}"
            result[label] = {
                "bare_ms": round(a * 1e3, 2),
                "loop_ms": round(b * 1e3, 2),
                "overhead": round(b / a - 1, 4),
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
