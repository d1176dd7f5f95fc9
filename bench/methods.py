"""Tuning methods on one task: quality, speed and memory of full, freeze, LoRA, DoRA and QLoRA on the quickstart.

    python bench/methods.py --out build/methods --budget 600

Every method is one run of ``train.py examples/quickstart.yaml`` in a process of its own, on the same data, steps and
seed; learning rates are the usual ones of each method. Read from it: held-out loss before and after, tokens/s (median
of the log), peak resident memory above the loaded libraries (``peak_run.py``), size of what was saved.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stage import Stage

ROOT = Path(__file__).resolve().parent.parent
STEPS, SMOKE_STEPS = 100, 2
COMMON = {"eval_on_start": "true", "plot_loss": "false", "save_strategy": "no", "check_adapter": "false"}
METHODS: dict[str, dict[str, str]] = {
    "full": {"finetuning_type": "full", "learning_rate": "2e-4"},
    "freeze, last layer": {"finetuning_type": "freeze", "freeze_trainable_layers": "1", "learning_rate": "5e-4"},
    "lora": {},
    "lora, stock PEFT": {"fuse": "false"},
    "lora, rsLoRA": {"use_rslora": "true"},
    "dora": {"use_dora": "true"},
    "qlora, NF4": {"quantization_bit": "4"},
}


def measure(options: dict[str, str], stage: Stage) -> dict[str, Any]:
    steps = SMOKE_STEPS if stage.smoke else STEPS
    with tempfile.TemporaryDirectory() as folder:
        keys = COMMON | {"max_steps": str(steps), "logging_steps": str(max(1, steps // 10)), "output_dir": folder}
        keys |= {"eval_steps": str(steps), **options}
        command = [sys.executable, "bench/peak_run.py", "train.py", "examples/quickstart.yaml"]
        command += [f"{key}={value}" for key, value in keys.items()]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed = run.stdout
        if run.returncode:
            raise RuntimeError(f"train.py ended with {run.returncode}: {printed[-300:]}")
        used = json.loads(printed.splitlines()[-1])
        records = [json.loads(line) for line in (Path(folder) / "trainer_log.jsonl").read_text().splitlines()]
        saved = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    trained = re.search(r"trained weights: ([\d,]+)", printed)
    assert trained, printed
    return {
        "options": options,
        "steps": steps,
        "trainable": int(trained[1].replace(",", "")),
        "loss_before": losses[0],
        "loss": losses[-1],
        "tokens_per_s": statistics.median(r["tokens_per_second"] for r in records if "tokens_per_second" in r),
        "peak_resident": used["peak"],
        "peak_above_imports": used["peak"] - used["imports"],
        "saved_bytes": saved,
    }


def main() -> int:
    stage = Stage("methods", __doc__)
    for name, options in METHODS.items():
        stage.measure(name, measure, options, stage, seconds=1.0 if stage.smoke else 60.0)
    return stage.exit_code()


if __name__ == "__main__":
    sys.exit(main())
