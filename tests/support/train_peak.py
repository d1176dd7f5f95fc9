"""Peak memory of real training runs on a CPU: ``train.py``'s main in processes that are forked from one that has only
imported it, so that code pages and oneDNN's generated code count where a user's run takes them.

``python -m tests.support.train_peak`` reads ``{"folder": ..., "points": [...]}`` from standard input: a folder for
models and data, and runs. It writes, per point, the bytes of the resident set's high-water mark above the resident set
where the trainer says its prediction, before it loads the model, and that prediction without the process itself.

Rows are longer than any ``cutoff_len``, but with ``"rows": "short"`` documents of a few hundred tokens, to be packed,
and with ``"rows": "mixed"`` every third is as short, to be padded.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train
from bench.memory import reset_peak, resident
from tests.engine.conftest import RECIPE, TEXTS
from tests.support.models import randomize
from tests.support.peak import DTYPES, config, in_child
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401 - imported before the fork

from fuselora.engine import memory_run, quickstart
from fuselora.engine.config import load_config
from fuselora.engine.estimate import estimate_run
from fuselora.engine.patch import patch_model  # noqa: F401

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "vocab_size": 2048}
EXTRA = {"qwen3": {"head_dim": 48}, "gemma2": {"head_dim": 48}}


def fill(folder: Path) -> None:
    """A tokenizer and three data sets."""
    if (folder / "dataset_info.json").exists():
        return
    quickstart._tokenizer(TEXTS, RECIPE).save_pretrained(folder)
    draw = random.Random(0)
    for name, every in {"long": 0, "short": 1, "mixed": 3}.items():
        rows = []
        for i in range(60):
            words = draw.randrange(20, 120) if every and i % every == 0 else 4500
            text = " ".join(draw.choice(("path", "join", "function", "os", "insert")) for _ in range(words))
            rows.append({"instruction": f"Join {i}", "input": "", "output": text})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    names = ("long", "short", "mixed")
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in names}))


def save_base(folder: Path, point: dict[str, Any]) -> Path:
    """A random model of the point's shape and dtype, with the folder's tokenizer."""
    base = folder / f"{point['family']}-{point['dtype']}-{point.get('layers', 5)}"
    if not base.exists():
        torch.manual_seed(0)
        sizes = SIZES | EXTRA.get(point["family"], {}) | {"num_hidden_layers": point.get("layers", 5)}
        model = AutoModelForCausalLM.from_config(config(point["family"], **sizes), dtype=DTYPES[point["dtype"]])
        randomize(model)
        model.save_pretrained(base)
        AutoTokenizer.from_pretrained(folder).save_pretrained(base)
    return base


def keys_of(folder: Path, point: dict[str, Any]) -> list[str]:
    """The configuration of a point as ``key=value``; ``"keys"`` of the point come last."""
    rows = point.get("rows", "long")
    keys: dict[str, Any] = {"model_name_or_path": save_base(folder, point), "dataset": rows, "dataset_dir": folder}
    keys |= {"output_dir": tempfile.mkdtemp(dir=folder), "overwrite_output_dir": True, "use_cpu": True}
    keys |= {"cutoff_len": point["length"], "per_device_train_batch_size": point["batch"], "lora_rank": 8}
    keys |= {"gradient_checkpointing": point["policy"], "bf16": point["dtype"] == "bf16", "save_strategy": "no"}
    keys |= {
        "max_steps": 4,
        "cpu_threads": 1,
        "memory_budget_gb": 20,
        "check_adapter": False,
        "packing": rows == "short",
    }
    keys |= {"tokenized_path": folder / "tokens" / f"{rows}-{point['length']}"} | point.get("keys", {})
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]


def above(arguments: list[str]) -> int:
    """The peak above what was resident before loading; 0 if the run failed."""
    before: list[int] = []
    say = memory_run.announce

    def announce(made: Any) -> str:
        text = say(made)
        reset_peak()
        before.append(resident("VmRSS"))
        return text

    memory_run.announce = announce
    sys.stdout = sys.stderr
    status = train.main(arguments)
    return resident("VmHWM") - before[0] if status == 0 else 0


def predicted(arguments: list[str]) -> int:
    """What the trainer predicts, without what the process holds before."""
    config = load_config(arguments)
    return estimate_run(memory_run.run_of(config)).total + memory_run.first_use(config)


def main() -> None:
    given = json.load(sys.stdin)
    folder = Path(given["folder"])
    fill(folder)
    torch.set_num_threads(1)
    found = []
    for point in given["points"]:
        arguments = keys_of(folder, point)
        made = predicted(arguments)
        found.append((in_child(partial(above, arguments)), made))
        print("point", json.dumps(point), *found[-1], file=sys.stderr, flush=True)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
